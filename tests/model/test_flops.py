"""FLOPs against the shapes of the real parameters, whole masks, and torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, SampleLayout, V4Model
from model.flops import training_flops
from model.parameters import parameter_counts
from model.positions import Positions
from tests.model.tiny import random_model, random_tokens, tiny_config
from trainer.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> ModelConfig:
    return load_config(CONFIGS / f"{name}.yaml").model


def matrices_of(config: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
    """Multiply-adds of one token with the parameter ``name``."""
    size = float(torch.Size(shape).numel())
    if len(shape) < 2 or name == "embed.weight" or name.endswith(".ape"):
        return 0
    if ".experts." in name:
        return size * config.num_experts_per_tok / config.n_routed_experts
    return size * (config.hc_mult if "h_proj" in name else 1)


def expected_flops(config: ModelConfig, lengths: list[int]) -> float:
    """Every parameter's shape, and every visible pair of every whole mask, times 2 and times 3."""
    with torch.device("meta"):
        model = V4Model(config)
    tokens, trained, indexer = sum(lengths), 0.0, 0.0
    for name, parameter in model.named_parameters():
        cost = tokens * matrices_of(config, name, tuple(parameter.shape))
        if "indexer" in name:
            indexer += cost
        else:
            trained += cost
    if config.num_nextn_predict_layers:
        trained += tokens * config.vocab_size * config.hidden_size  # the head once more
    n, dim = config.hc_mult, config.hidden_size
    heads = 1 + config.num_nextn_predict_layers
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    trained += tokens * dim * (blocks * 2 * (n + n + n * n) + heads * n)
    positions = Positions.of_microbatch(config, SampleLayout.from_lengths([lengths]))
    kinds = [*config.layer_types, *["window"] * config.num_nextn_predict_layers]
    query = torch.arange(tokens)
    for kind in kinds:
        ranges = positions.ranges(kind)
        visible = query - ranges.window_start_T + 1
        if kind != "window":
            entries = ranges.entry_end_T - ranges.entry_start_T
            if kind == "csa":
                width = config.index_n_heads * (config.index_head_dim + 1)
                indexer += width * float(entries.sum())
                entries = entries.clamp(max=config.index_topk)
            visible = visible + entries
        trained += 2 * config.num_attention_heads * config.head_dim * float(visible.sum())
    return 2 * (3 * trained + indexer)


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [1]),
        ({}, [75]),
        ({}, [3, 40, 129, 1]),
        ({"num_nextn_predict_layers": 0}, [50]),
        ({"num_hidden_layers": 1, "layer_types": ("window",)}, [50]),
        ({"num_hidden_layers": 1, "layer_types": ("csa",)}, [90]),
        ({"num_hidden_layers": 1, "layer_types": ("hca",)}, [90]),
        ({"hc_mult": 1}, [30]),
    ],
    ids=str,
)
def test_equals_shapes_and_masks(changes, lengths):
    config = tiny_config(**changes)
    assert training_flops(config, lengths) == pytest.approx(expected_flops(config, lengths), 1e-9)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_equals_shapes_and_masks_at_the_released_sizes(name):
    config = shipped(name)
    ours, expected = training_flops(config, [4096]), expected_flops(config, [4096])
    assert ours == pytest.approx(expected, 1e-9)
    # Six times the active parameters a token is most of it at 4K, and nothing is charged per
    # residual stream (that would be four times as much).
    active = parameter_counts(config).active
    assert 1.0 < training_flops(config, [4096], mtp=False) / (6 * active * 4096) < 1.35


def test_torch_counts_about_the_same(monkeypatch):
    """Short windows: what bands compute beyond them is small compared with the projections."""
    config = tiny_config(
        hidden_size=64,
        moe_intermediate_size=64,
        vocab_size=1024,
        q_lora_rank=64,
        num_nextn_predict_layers=0,
        num_hidden_layers=2,
        layer_types=("window", "window"),
    )
    model = random_model(config)
    tokens = random_tokens(config, 2, 256)

    def grouped(a, b, offs=None, bias=None, out_dtype=None, out_val=None, out_shape=None, **kwargs):
        if len(a) == 2 and len(b) == 3:
            return 2 * a[0] * a[1] * b[2]
        return 2 * a[0] * a[1] * b[1]

    def add_matmul(total, a, b, out_val=None, out_shape=None, **kwargs):
        return 2 * a[0] * a[1] * b[1]

    # MKL's matmuls of all groups are no operator that torch could count.
    monkeypatch.setattr("model.kernels.grouped_mm.eager._by_mkl", lambda *tensors: False)
    grouped_mm = torch.ops.aten._grouped_mm.default
    # torch counts addmm, but not in place, as the gradient of the head's weight is computed.
    formulas = {grouped_mm.overloadpacket: grouped, torch.ops.aten.addmm_: add_matmul}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    assert formulas.keys() <= counter.get_flop_counts()["Global"].keys()
    ratio = counter.get_total_flops() / training_flops(config, [256, 256])
    assert 0.95 < ratio < 1.2, ratio


def test_packed_rows_cost_what_their_samples_cost():
    config = tiny_config()
    apart = training_flops(config, [100]) + training_flops(config, [156])
    assert training_flops(config, [100, 156]) == pytest.approx(apart, 1e-12)
    assert training_flops(config, [256]) > apart


def test_growth_is_linear_beyond_the_window():
    config = tiny_config(num_hidden_layers=2, layer_types=("window", "window"))
    lengths = [1000, 2000, 3000]
    first, second, third = (training_flops(config, [n]) for n in lengths)
    assert third - second == pytest.approx(second - first, 1e-12)
    # With entries, the quadratic part is what is seen of them: small at 64K in Flash.
    flash = shipped("flash")
    per_token = [training_flops(flash, [n]) / n for n in (4096, 65536)]
    assert 1.0 < per_token[1] / per_token[0] < 2.0


def test_the_mtp_block_can_be_left_out():
    config = tiny_config()
    without = tiny_config(num_nextn_predict_layers=0)
    assert training_flops(config, [70], mtp=False) == training_flops(without, [70])
