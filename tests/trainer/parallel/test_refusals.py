"""Products that do not fit model, data or processes: one sentence, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.topologies import MODEL
from trainer.config import ConfigError, load_config
from trainer.config.parallel import nearest


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.tensor=3"], ["num_attention_heads = 4", "tensor = 3", "should be 2 or 4"]),
        (["parallel.tensor=4", "model.o_groups=2"], ["o_groups = 2", "tensor = 4", "be 2"]),
        (["parallel.tensor=2", "model.vocab_size=401"], ["vocab_size = 401", "should be 1"]),
        (["parallel.expert=3"], ["n_routed_experts = 8", "expert = 3", "should be 2 or 4"]),
        (["parallel.expert_tensor=3"], ["moe_intermediate_size = 32", "should be 2 or 4"]),
        (["parallel.expert_tensor=8"], ["multiples of 8", "should be 4"]),
        (["parallel.context=5"], ["seq_len = 48", "context = 5", "45 or 50"]),
        (["parallel.pipeline=8"], ["pipeline = 8", "8 stages", "num_hidden_layers = 4", "most 5"]),
        (
            ["parallel.pipeline=3", "parallel.pipeline_schedule=zero_bubble_v"],
            ["pipeline = 3 with zero_bubble_v", "6 stages", "at most 2"],
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_stages_per_rank=3"],
            ["pipeline_stages_per_rank = 3", "pipeline_schedule = 1f1b", "should be 1 or null"],
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers_per_stage=[2, 3]"],
            ["pipeline_layers_per_stage = [2, 3]", "2 stages", "num_hidden_layers"],
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers_per_stage=[0, 4]"],
            ["pipeline_layers_per_stage = [0, 4]", "none but the last 0"],
        ),
        (
            ["parallel.recompute=[attention]", "parallel.offload=[block]"],
            ["parallel.offload = [block]", "parallel.recompute = [attention] should have block"],
        ),
        (["parallel.pipeline_schedule=gpipe"], ["pipeline_schedule = 'gpipe'", "1f1b"]),
        (["parallel.tensr=2"], ["parallel.tensr", "tensor"]),
    ],
)
def test_what_does_not_split_is_refused(tiny: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, [*MODEL, *overrides])
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    ("world", "overrides", "parts"),
    [
        (6, ["parallel.tensor=4"], ["= 4 does not divide the 6 processes", "4 or 8 processes"]),
        (2, ["parallel.expert=4"], ["expert x pipeline = 4 does not", "start 4 processes"]),
        (8, [], ["data.global_batch_size = 4", "at least", "data-parallel ranks, 8"]),
        (
            4,
            ["parallel.pipeline=4", "data.global_batch_size=2"],
            [
                "2 microbatches",
                "fewer than the 4",
                "global_batch_size should be at least 4",
                "micro_batch_size",
            ],
        ),
        (
            2,
            [
                "parallel.pipeline=2",
                "parallel.pipeline_schedule=dual_pipe_v",
                "data.global_batch_size=3",
            ],
            ["3 microbatches", "fewer than the 4", "dual_pipe_v", "at least 4"],
        ),
        (
            4,
            ["parallel.pipeline=2", "data.micro_batch_size=2", "data.global_batch_size=6"],
            ["3 rows", "micro_batch_size = 2", "4 or 8"],
        ),
        (
            2,
            [
                "parallel.pipeline=2",
                "parallel.pipeline_schedule=interleaved_1f1b",
                "data.global_batch_size=5",
            ],
            ["5 microbatches", "2 rounds", "4 or 6"],
        ),
    ],
)
def test_what_does_not_fit_the_processes_is_refused(
    tiny: Path, world: int, overrides: list[str], parts: list[str]
) -> None:
    config = load_config(tiny, [*MODEL, *overrides])
    with pytest.raises(ConfigError) as caught:
        config.degrees(world)
    text = str(caught.value)
    for part in parts:
        assert part in text, text


def test_the_values_named_are_accepted(tiny: Path) -> None:
    for world, overrides in (
        (4, ["parallel.pipeline=4", "data.global_batch_size=4"]),
        (
            2,
            [
                "parallel.pipeline=2",
                "parallel.pipeline_schedule=interleaved_1f1b",
                "data.global_batch_size=6",
            ],
        ),
        (8, ["parallel.tensor=4"]),
        (4, ["parallel.expert_tensor=4"]),
    ):
        load_config(tiny, [*MODEL, *overrides]).degrees(world)


def test_nearest_divisors() -> None:
    assert nearest(3, 8) == "2 or 4"
    assert nearest(9, 8) == "8"
    assert nearest(5, 7) == "1 or 7"
