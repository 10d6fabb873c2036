"""What is seen inside the layers, of groups of weights and of sources, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.prepare import prepare
from model import IGNORE_INDEX, SampleLayout, V4Model
from model.block import Block
from tests.model.tiny import tiny_config
from tests.trainer.parallel.topologies import Job, run_all, topology
from tests.trainer.tiny import saved_tensors, train
from trainer.build import build_native
from trainer.config import load_config
from trainer.engine import NativeEngine
from trainer.evaluation import Validation
from trainer.metrics.flatten import flatten
from trainer.metrics.jsonl import read_metrics
from trainer.metrics.layer_hooks import collect_stats
from trainer.parallel.grid import Grid
from trainer.report import write_report

Numbers = dict[tuple[str, str, int], tuple[float, float]]


def model_of(**settings: object) -> V4Model:
    model = V4Model(tiny_config(initializer_range=0.3, **settings))
    model.init_weights(3)
    return model


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))


def seen_in(model: V4Model) -> Numbers:
    with collect_stats(model) as collector:
        model(tokens(), targets=tokens())
    return collector.to_host()


def test_streams_and_swiglu_are_those_of_a_plain_pass() -> None:
    """Inner values of every token in every expert that it goes to, one by one."""
    model = model_of(swiglu_limit=1.0)
    inputs: dict[int, Tensor] = {}
    chosen: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}
    hooks = []
    for row, block in enumerate(model.layers):
        hooks += [
            block.ffn.register_forward_pre_hook(lambda _, x, row=row: inputs.update({row: x[0]})),
            block.ffn.gate.register_forward_hook(
                lambda _, __, out, row=row: chosen.update({row: out.indices_TA})
            ),
            block.register_forward_hook(lambda _, __, out, row=row: streams.update({row: out[0]})),
        ]
    with torch.no_grad():
        model(tokens(), targets=tokens())
    for hook in hooks:
        hook.remove()
    stats = seen_in(model)
    for row, block in enumerate(model.layers):
        shared, experts = block.ffn.shared_experts, block.ffn.experts
        pairs = [
            (F.linear(x, shared.w1.weight), F.linear(x, shared.w3.weight)) for x in inputs[row]
        ]
        for x, indices in zip(inputs[row], chosen[row].tolist(), strict=True):
            pairs += [(experts.w1[e] @ x, experts.w3[e] @ x) for e in indices]
        gate, up = (torch.cat(values) for values in zip(*pairs, strict=True))
        clamped, count = stats["swiglu_clamped_share", "mean", row]
        assert count == gate.numel()
        assert clamped == int(((gate > 1) | (up.abs() > 1)).sum()) > 0
        top = float(torch.cat([gate, up]).abs().max())
        assert stats["swiglu_max", "max", row][0] == pytest.approx(top, rel=1e-5)
        total, count = stats["stream_rms", "mean", row]
        assert total / count == pytest.approx(float(streams[row].square().mean()), rel=1e-5)
        assert stats["stream_max", "max", row][0] == float(streams[row].abs().max())
    assert {row for _, _, row in stats} == {*range(len(model.layers) + 1)}, "the MTP block, too"


def test_a_model_that_is_watched_stays_as_it_is() -> None:
    model = model_of()
    before = model(tokens(), targets=tokens()).loss
    seen_in(model)
    assert torch.equal(model(tokens(), targets=tokens()).loss, before)
    assert all("compute" not in vars(block) for block in model.layers)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_fewer_iterations_leave_the_mixing_matrices_less_doubly_stochastic() -> None:
    def departure(iterations: int) -> float:
        stats = seen_in(model_of(hc_sinkhorn_iters=iterations, hc_init_scale=0.1))
        return stats["comb_sum_error", "max", 1][0]

    assert departure(1) > 10 * departure(20) > 0


def test_both_mixing_matrices_of_a_layer_are_checked() -> None:
    model = model_of(hc_sinkhorn_iters=1, hc_init_scale=0.1)
    before_attention: dict[int, float] = {}

    def look(block: Block, inputs: tuple[Tensor, ...]) -> None:
        comb_TNN = block.hc_attn.read(inputs[0])[2]
        sums = torch.cat([comb_TNN.sum(1), comb_TNN.sum(2)])
        before_attention[block.layer_index] = float((sums - 1).abs().max())

    for block in model.layers:
        block.register_forward_pre_hook(look)
    stats = seen_in(model)
    pairs = [(stats["comb_sum_error", "max", n][0], least) for n, least in before_attention.items()]
    assert all(seen >= least for seen, least in pairs)
    assert any(seen == least for seen, least in pairs), "the other is always larger"


def test_padding_has_no_part_in_the_recall() -> None:
    """After a sample of twenty tokens, it has separate entries."""
    model, layout = model_of(index_topk=2), SampleLayout.from_lengths([[20], [40]], 40)
    targets = tokens()
    targets[0, 20:] = IGNORE_INDEX
    (row,) = [n for n, attn in model.attentions().items() if attn.indexer is not None][:1]
    attn, inputs = model.attentions()[row], list[Any]()
    attn.register_forward_pre_hook(lambda _, given: inputs.append(given[:3]))
    with collect_stats(model) as collector:
        model(tokens(), layout, targets)
    kept, whole = attn.selected_and_total_mass(*inputs[0])
    real = ~layout.padding_T
    assert whole[~real].any()
    actual = collector.to_host()["indexer_recall", "mean", row]
    assert actual == pytest.approx((float(kept[real].sum()), float(whole[real].sum())))
    assert actual[0] < 0.9 * actual[1]


def close(ours: object, theirs: object) -> bool:
    if isinstance(ours, dict):
        assert isinstance(theirs, dict) and ours.keys() == theirs.keys()
        return all(close(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        assert isinstance(theirs, list)
        return all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    return ours is theirs is None or ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.timeout(300)
def test_ranks_see_together_what_one_sees(tiny: Path, tmp_path: Path) -> None:
    """Four rows at once, or two on each of two ranks; or the first two of four."""
    jobs = [
        (topology(1, "data.micro_batch_size=4"), "four"),
        (topology(2, "data.micro_batch_size=2", expert=2), "expert"),
        (topology(1, "data.micro_batch_size=2"), "two"),
        (topology(2, "data.micro_batch_size=2", pipeline=2), "pipeline"),
        (topology(2, "data.micro_batch_size=2", tensor=2), "tensor"),
        (topology(2, "data.micro_batch_size=2", context=2), "context"),
    ]
    overrides = ("steps=2", "metrics.layer_stats_every=2", "checkpoint.every=1")
    run_all(tiny, [Job(spread, tmp_path / name) for spread, name in jobs], *overrides)
    records = {name: read_metrics(tmp_path / name / "metrics.jsonl")[-1] for _, name in jobs}
    assert {"swiglu_clamped_share", "stream_rms", "comb_sum_error"} < records["two"][
        "layers"
    ].keys()
    recall = records["two"]["layers"]["indexer_recall"]
    assert [value is None for value in recall] == [True, False, True, False, True]
    pairs = [("four", "expert"), *(("two", name) for name in ("pipeline", "tensor", "context"))]
    for one, other in pairs:
        for part in ("layers", "groups"):
            assert close(records[one][part], records[other][part]), (other, part)
    update = records["two"]["groups"]["update_rms"]
    for group, names in (("experts", ".ffn.experts."), ("embedding", "embed.weight")):
        assert update[group] == pytest.approx(change(tmp_path / "two", names), rel=1e-4)


def change(run_dir: Path, part: str) -> float:
    """Root mean square of what step 2 changed in the tensors whose name contains `part`."""
    first, second = (saved_tensors(run_dir / f"checkpoints/step-0000000{step}") for step in (1, 2))
    names = [name for name in first if part in name and not name.startswith("optim.")]
    differences = torch.cat([(second[name] - first[name]).flatten() for name in names])
    return float(differences.double().square().mean().sqrt())


def test_sources_apart_are_the_sources_together(tiny: Path, tmp_path: Path) -> None:
    """No document is cut, so that the same tokens are predicted from the same ones."""
    lines = (tiny.parent / "words.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:60]))
    (tmp_path / "many.jsonl").write_text("".join(lines[60:]))
    sources = [{"name": n, "paths": [str(tmp_path / f"{n}.jsonl")]} for n in ("few", "many")]
    settings = [
        f"data.sources={json.dumps(sources)}",
        f"data.shards={tmp_path / 'shards'}",
        "data.seq_len=1024",
        "evaluation.max_rows=null",
        f"run_dir={tmp_path / 'run'}",
    ]
    config = load_config(tiny, settings)
    prepare(config.data, progress=False)
    local, _ = build_native(config, Grid.single())
    engine = NativeEngine(local, Grid.single())
    validation = Validation(config, Grid.single())
    whole, parts = validation.evaluate(engine), validation.by_source(engine)
    assert parts is not None and parts.losses.keys() == {"few", "many"}
    tokens_of = {name: loader.num_targets for name, loader in validation.sources.items()}
    assert sum(tokens_of.values()) == whole.tokens
    mean = sum(parts.losses[name] * count for name, count in tokens_of.items()) / whole.tokens
    assert mean == pytest.approx(whole.loss, rel=1e-6)
    assert parts.bits_per_byte is not None and whole.bytes is not None
    bytes_of = {name: part.bytes or 0 for name, part in parts.evaluations.items()}
    bits = sum(parts.bits_per_byte[name] * size for name, size in bytes_of.items()) / whole.bytes
    assert bits == pytest.approx(whole.bits_per_byte, rel=1e-6)
    train(
        tiny,
        tmp_path / "run",
        *settings,
        "steps=1",
        "data.global_batch_size=1",
        "data.micro_batch_size=1",
    )
    (record,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert record["validation_by_source"].keys() == {"few", "many"}
    assert record["validation_bits_per_byte_by_source"].keys() == {"few", "many"}
    assert flatten(record)["validation_bits_per_byte/many"] > 0
    page = write_report(load_config(tiny, settings)).read_text(encoding="utf-8")
    assert 'aria-label="Validation text by source"' in page
    assert 'aria-label="Validation loss by source"' in page and ">many</text>" in page
    assert "Update sizes in step 1<" in page and "<td>hyper connections</td>" in page
    assert "<b>indexer recall</b>" in page
    assert Validation(load_config(tiny), Grid.single()).by_source(engine) is None
