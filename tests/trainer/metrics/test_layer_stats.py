"""What is reported of every layer, against sums by hand and on ranks that split the layers."""

import math
from pathlib import Path

import pytest
import torch

from tests.distributed import spawn
from tests.trainer.tiny import train
from trainer.build import build_native
from trainer.config import load_config
from trainer.metrics.jsonl import read_metrics
from trainer.metrics.layer_stats import compute_layer_stats, expert_load_stats, flatten_layers
from trainer.parallel.grid import Degrees, Grid
from trainer.report import write_report
from trainer.step import LayerStats


def test_expert_numbers_by_hand() -> None:
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [6.0, 2.0, 0.0, 0.0]])
    stats = expert_load_stats(load)
    assert stats["expert_load_max"] == pytest.approx([1.0, 4.0, 3.0])
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert stats["expert_load_entropy"] == pytest.approx([1.0, 0.0, uneven])
    assert stats["dead_expert_share"] == [0.0, 0.75, 0.5]


def numbers_of(rank: int, world_size: int, path: Path, degrees: Degrees) -> LayerStats:
    """Of a model whose sinks and biases differ by layer and by head or expert."""
    config = load_config(path, ["parallel.pipeline=2"] if degrees.pipeline == 2 else [])
    grid = Grid.build(degrees, torch.device("cpu")) if world_size > 1 else Grid.single()
    local, _ = build_native(config, grid)
    with torch.no_grad():
        for row, router in local.model.routers().items():
            if not router.hashed:
                router.bias.copy_(torch.arange(len(router.bias)) - row)
        for row, attention in local.model.attentions().items():
            placement = local.placements[f"layers.{row}.attn.attn_sink"] if row < 3 else None
            first = placement.global_offset[0] if placement else 0
            attention.attn_sink.copy_(row + 10.0 * torch.arange(len(attention.attn_sink)))
            attention.attn_sink += 10.0 * first
    load = torch.arange(16.0).view(4, 4)
    return compute_layer_stats(local.model, load, grid)


@pytest.mark.parametrize("degrees", [Degrees(2, tensor=2), Degrees(2, pipeline=2)])
def test_ranks_that_split_the_layers_see_all_of_them(tiny: Path, degrees: Degrees) -> None:
    expected = numbers_of(0, 1, tiny, Degrees(1))
    assert expected["router_bias_min"] == [None, -1.0, -2.0, -3.0]
    assert expected["router_bias_max"] == [None, 2.0, 1.0, 0.0]
    assert expected["sink_max"][:3] == [10.0, 11.0, 12.0]
    for actual in spawn(numbers_of, 2, tiny, degrees):
        if degrees.tensor == 2:  # the MTP block's sinks are not told apart above
            expected["sink_max"][3] = actual["sink_max"][3]
        assert actual == expected


def test_a_run_reports_its_layers(tiny: Path, tmp_path: Path) -> None:
    config = train(
        tiny, tmp_path, "steps=5", "metrics.layer_stats_every=2", "router_bias_speed=0.25"
    )
    records = read_metrics(config.run_dir / "metrics.jsonl")
    with_layers = [record for record in records if "layers" in record]
    assert [record["step"] for record in with_layers] == [2, 4, 5]
    last = with_layers[-1]["layers"]
    assert {len(values) for values in last.values()} == {4}
    assert max(last["expert_load_max"]) == pytest.approx(records[-1]["expert_load_max"])
    reach = max(abs(last["router_bias_min"][1]), last["router_bias_max"][1])
    assert 0.25 <= reach <= 1.25 and reach % 0.25 == 0, "five steps of a quarter"
    assert flatten_layers(last)["layers/sink_min/03"] == last["sink_min"][3]
    assert not any(name.startswith("layers/router_bias_min/00") for name in flatten_layers(last))
    page = write_report(config).read_text()
    assert "Most loaded expert of each layer" in page and "MTP: window, learned" in page
