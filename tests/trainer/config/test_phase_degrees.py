"""Phases with their own degrees: what they inherit, what is refused, and where processes end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.config.test_recipe import phased
from trainer.config import ConfigError, load_config

DENSE = {"attention": "dense", "micro_batch_size": 1}
RECOMPUTED = {"context": 2, "recompute": ["block"]}
PHASES: list[dict[str, Any]] = [
    DENSE | {"until_tokens": 800, "seq_len": 32},
    DENSE | {"until_tokens": 1600, "seq_len": 64, "parallel": RECOMPUTED},
    DENSE | {"until_tokens": 2400, "seq_len": 64, "parallel": RECOMPUTED},
    DENSE | {"until_tokens": 3200, "seq_len": 64, "parallel": {"tensor": 1, "pipeline": 2}},
]


def with_degrees(tiny: Path, folder: Path, *degrees: dict[str, Any] | None) -> Path:
    """The tiny run whose phases have these degrees of their own."""
    phases = [
        phase | {"parallel": own}
        for phase, own in zip(PHASES[: len(degrees)], degrees, strict=True)
    ]
    return phased(tiny, folder, phases)


def test_a_segment_has_the_phases_with_the_same_degrees(tiny: Path, tmp_path: Path) -> None:
    overrides = ["parallel.tensor=2", "data.micro_batch_size=1"]
    config = load_config(phased(tiny, tmp_path, PHASES), overrides)
    segments = config.recipe.segments
    assert [[phase.number for phase in s.phases] for s in segments] == [[0], [1, 2], [3]]
    assert [(s.parallel.tensor, s.parallel.context, s.parallel.pipeline) for s in segments] == [
        *((2, 1, 1), (2, 2, 1), (1, 1, 2))
    ]
    assert [s.parallel.recompute for s in segments] == [(), ("block",), ()]
    assert segments[-1].end == config.recipe.steps
    for first, second in pairwise(segments):
        assert first.end == second.first
        assert config.at_step(first.end - 1).segment == first
        assert config.at_step(first.end).segment == second
    assert config.at_step(config.recipe.steps).segment == segments[-1]
    assert config.min_world == 4
    degrees = [config.at_step(s.first).degrees(4) for s in segments]
    assert [(d.tensor, d.context, d.data, d.pipeline) for d in degrees] == [
        *((2, 1, 2, 1), (2, 2, 1, 1), (1, 1, 2, 2))
    ]


def test_degrees_that_are_the_runs_own_divide_nothing(tiny: Path, tmp_path: Path) -> None:
    path = with_degrees(tiny, tmp_path, None, {"tensor": 2}, {"recompute": []})
    config = load_config(path, ["parallel.tensor=2"])
    assert len(config.recipe.segments) == 1


def test_a_pipeline_of_its_own_has_stages_of_its_own(tiny: Path, tmp_path: Path) -> None:
    path = with_degrees(tiny, tmp_path, None, {"pipeline": 3}, {"tensor": 2})
    layers = ["parallel.pipeline=2", "parallel.pipeline_layers_per_stage=[2,1]"]
    first, second, third = load_config(path, layers).recipe.phases
    assert first.parallel.pipeline_layers_per_stage == (2, 1)
    assert second.parallel.pipeline_layers_per_stage is None
    assert third.parallel.pipeline_layers_per_stage == (2, 1)


def test_what_is_saved_is_the_config_in_every_segment(tiny: Path, tmp_path: Path) -> None:
    config = load_config(phased(tiny, tmp_path, PHASES), ["parallel.tensor=2"])
    later = config.at_step(config.recipe.steps - 1)
    assert later.segment != config.segment
    assert later.digest() == config.digest() and later.to_yaml() == config.to_yaml()
    path = tmp_path / "again.yaml"
    path.write_text(later.to_yaml())
    assert load_config(path).recipe.segments == config.recipe.segments
    assert later.model_copy(update={"seed": 5}).segment == later.segment
    alone = later.alone()
    assert len(alone.recipe.segments) == 1 and alone.segment.parallel.tensor == 1


@pytest.mark.parametrize(
    ("degrees", "world", "sentence"),
    [
        (
            {"tensor": 3},
            None,
            "phases.1.parallel: model.num_attention_heads = 2 does not split over parallel.tensor "
            "= 3; parallel.tensor should be 2",
        ),
        (
            {"expert": 3},
            None,
            "phases.1.parallel: model.n_routed_experts = 4 does not split over parallel.expert = 3",
        ),
        (
            {"context": 3},
            None,
            "phases.1.parallel: data.seq_len = 50 does not divide into parallel.context = 3 x "
            "parallel.tensor = 1 equal runs; data.seq_len should be 48 or 51",
        ),
        (
            {"pipeline": 5},
            None,
            "phases.1.parallel: parallel.pipeline = 5 with 1f1b makes 5 stages",
        ),
        (
            {"offload": ["block"]},
            None,
            "phases.1.parallel: parallel.offload = [block] moves the input of a recomputed part",
        ),
        (
            {"context": 2, "tensor": 2},
            2,
            "phases.1.parallel: parallel.tensor x context x pipeline = 4 does not divide the 2 "
            "processes; start 4 processes",
        ),
        (
            {"pipeline": 2, "pipeline_schedule": "dual_pipe_v"},
            4,
            "phases.1.parallel: 2 microbatches per step are fewer than the 4",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_one_sentence(
    tiny: Path, tmp_path: Path, degrees: dict[str, Any], world: int | None, sentence: str
) -> None:
    path = with_degrees(tiny, tmp_path, None, degrees)
    overrides = ["data.seq_len=50"] if "context" in degrees and "tensor" not in degrees else []
    with pytest.raises(ConfigError) as caught:
        config = load_config(path, [*overrides, "data.micro_batch_size=1"])
        assert world is not None
        config.check_world(world)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_a_phase_cannot_have_is_named(tiny: Path, tmp_path: Path) -> None:
    path = with_degrees(tiny, tmp_path, None, {"data": 2})
    with pytest.raises(ConfigError, match=r"phases\.1\.parallel\.data"):
        load_config(path)


def test_a_config_without_them_is_read_as_before(tiny: Path, tmp_path: Path) -> None:
    """That of a run folder of an earlier version has no such key."""
    config = load_config(phased(tiny, tmp_path, PHASES[:1]))
    values = config.to_dict()
    del values["phases"][0]["parallel"]
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(values))
    again = load_config(path)
    assert again.to_dict() == config.to_dict() and len(again.recipe.segments) == 1
