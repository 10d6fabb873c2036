"""Dense, warm-up and sparse attention: who attends to what, and who learns from what."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model import IGNORE_INDEX, SampleLayout, V4Model
from model import attention as module
from model.config import AttentionMode, ModelConfig
from model.flops import training_flops
from model.kernels.attention import AttentionInputs
from model.kernels.attention.naive import naive_probabilities, naive_selection_mask
from model.kernels.indexer import IndexerInputs, KLTarget
from model.kernels.indexer.naive import naive_scores
from tests.model.tiny import random_model, random_tokens, tiny_config

ONE = {"num_hidden_layers": 1, "layer_types": ("csa",), "num_hash_layers": 0}
LENGTHS = [[5, 43], [20, 21], []]


def run(model: V4Model, attention: AttentionMode) -> Any:
    """Losses of three rows, the last two with padding."""
    tokens = random_tokens(model.config, 3, 48)
    targets = tokens.roll(-1, 1)
    for row, lengths in enumerate(LENGTHS):
        targets[row, sum(lengths) :] = IGNORE_INDEX
    layout = SampleLayout.from_lengths(LENGTHS, 48)
    return model(tokens, layout, targets, attention=attention)


def gradients(model: V4Model, attention: AttentionMode) -> dict[str, Tensor]:
    model.zero_grad()
    run(model, attention).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole_matrices(config: ModelConfig, recorded: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Probability mass of entries, scores, and which entries are seen, each [T, C], in float64."""
    attention, index = recorded["attention"], recorded["index"]
    ranges, entries = attention.ranges, len(attention.entries_CK)
    t, c = torch.arange(len(attention.q_THK)), torch.arange(entries)
    near = (ranges.window_start_T[:, None] <= t) & (t[:, None] >= t)
    open_ = (c >= ranges.entry_start_T[:, None]) & (c < ranges.entry_end_T[:, None])
    if attention.selected_Tk is not None:
        open_ &= naive_selection_mask(attention.selected_Tk, entries)
    tensors = (attention.q_THK, attention.kv_LK, attention.entries_CK, attention.sink_H)
    probability = naive_probabilities(
        *[x.double() for x in tensors], attention.rotation_Tr, near, open_, config.rms_norm_eps
    )
    mass = probability[..., len(t) :].sum(1)
    scores = naive_scores(*[x.double() for x in (index.q_TIJ, index.keys_CJ, index.weights_TI)])
    return mass, scores.masked_fill(~open_, -torch.inf), open_


def divergence(config: ModelConfig, recorded: dict[str, Any]) -> float:
    """The objective from whole matrices in float64: what attention and the objective were given."""
    mass, scores, open_ = whole_matrices(config, recorded)
    total = 0.0
    for token in torch.nonzero(open_.any(1) & ~recorded["padding"]).flatten().tolist():
        entries = open_[token]
        p = mass[token, entries] / mass[token, entries].sum()
        total += float((p * (p.log() - scores[token, entries].log_softmax(0))).sum())
    return total / int((~recorded["padding"]).sum())


@pytest.mark.parametrize("attention", ["warmup", "sparse"])
def test_the_objective_is_the_divergence_from_the_core_attention(attention: AttentionMode) -> None:
    model = random_model(tiny_config(**ONE, index_topk=3, num_nextn_predict_layers=0))
    recorded: dict[str, Any] = {"padding": SampleLayout.from_lengths(LENGTHS, 48).padding_T}
    attend, objective = module.attention_with_lse2, module.indexer_objective

    def attending(inputs: AttentionInputs, *more: Any) -> tuple[Tensor, Tensor]:
        recorded["attention"] = inputs
        return attend(inputs, *more)

    def learning(inputs: IndexerInputs, target: KLTarget, weight_T: Tensor, *more: Any) -> Tensor:
        recorded["index"] = inputs
        return objective(inputs, target, weight_T, *more)

    with (
        torch.no_grad(),
        patch.object(module, "attention_with_lse2", attending),
        patch.object(module, "indexer_objective", learning),
    ):
        actual = float(run(model, attention).indexer_loss)
    assert (recorded["attention"].selected_Tk is not None) == (attention == "sparse")
    assert actual == pytest.approx(divergence(model.config, recorded), rel=1e-5)


@pytest.mark.parametrize("topk", [3, 500])
def test_recall_is_the_share_of_the_dense_mass_that_is_kept(topk: int) -> None:
    """Equal scores go to the lower entry."""
    model = random_model(tiny_config(**ONE, index_topk=topk, num_nextn_predict_layers=0))
    layer, recorded = model.layers[0].attn, dict[str, Any]()
    inputs: list[Any] = []
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[:3]))
    attend = module.attention_with_lse2

    def attending(inputs: AttentionInputs, *more: Any) -> tuple[Tensor, Tensor]:
        recorded["attention"] = inputs
        return attend(inputs, *more)

    with torch.no_grad(), patch.object(module, "attention_with_lse2", attending):
        run(model, "select")
        x_TD, positions, exchange = inputs[0]
        recorded["index"] = layer.indexer(x_TD, layer.q_norm(layer.wq_a(x_TD)), positions, exchange)
        selected, total = layer.selected_and_total_mass(x_TD, positions, exchange)
    mass, scores, open_ = whole_matrices(model.config, recorded)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    assert recorded["attention"].selected_Tk is None and open_.any()
    torch.testing.assert_close(total.double(), mass.sum(1), rtol=1e-5, atol=1e-7)
    expected = (mass * (rank < topk)).sum(1)
    torch.testing.assert_close(selected.double(), expected, rtol=1e-5, atol=1e-7)
    assert bool((selected < 0.9 * total).any()) == (topk == 3)


def test_neither_learns_from_the_other() -> None:
    model = random_model(tiny_config(index_topk=3))
    plain, sparse = gradients(model, "select"), gradients(model, "sparse")
    indexers = {name for name in sparse if ".indexer." in name}
    assert plain.keys() == sparse.keys() - indexers and len(indexers) >= 6
    assert all(torch.equal(plain[name], sparse[name]) for name in plain)
    assert all(bool(sparse[name].any()) for name in indexers)
    dense, warmup = gradients(model, "dense"), gradients(model, "warmup")
    assert all(torch.equal(dense[name], warmup[name]) for name in dense)
    assert not any(torch.equal(warmup[name], sparse[name]) for name in indexers)


def test_dense_attends_to_everything() -> None:
    """So does sparse attention that may keep more entries than there are."""
    with torch.no_grad():
        few, many = (random_model(tiny_config(index_topk=k)) for k in (3, 500))
        losses = {mode: float(run(few, mode).lm_loss) for mode in ("dense", "warmup", "sparse")}
        assert losses["dense"] == losses["warmup"] != losses["sparse"]
        assert losses["sparse"] == float(run(few, "select").lm_loss)
        out = run(many, "sparse")
        assert float(out.lm_loss) == losses["dense"] and float(out.indexer_loss) > 0
        assert float(out.indexer_loss) == float(run(few, "warmup").indexer_loss)


def test_operations_by_mode() -> None:
    """By hand for a query that sees many entries and one that sees few."""
    config = tiny_config(**ONE, num_nextn_predict_layers=0, index_topk=3)
    wide = config.model_copy(update={"index_topk": 500})
    of = {m: training_flops(config, [90], attention=m) for m in ("select", "dense", "warmup")}
    entries = sum((t + 1) // 4 for t in range(90))
    selected = sum(min((t + 1) // 4, 3) for t in range(90))
    inner = config.num_attention_heads * config.head_dim
    width = config.index_n_heads * config.index_head_dim
    index = 2 * 90 * (config.q_lora_rank * width + config.hidden_size * config.index_n_heads)
    index += 2 * 90 * 4 * config.hidden_size * config.index_head_dim
    index += 2 * (width + config.index_n_heads) * entries
    assert of["dense"] - (of["select"] - index) == pytest.approx(
        3 * 4 * inner * (entries - selected)
    )
    sparse = training_flops(config, [90], attention="sparse")
    assert sparse - of["select"] == pytest.approx(2 * index + 2 * inner * selected)
    assert training_flops(wide, [90], attention="dense") == of["dense"]
    assert of["warmup"] == pytest.approx(of["dense"] / 3 + 3 * index + 2 * inner * entries)
