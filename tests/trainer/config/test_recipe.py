"""Phases: functions of the step, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import ConfigError, load_config

CHANGING = [
    {
        "until_tokens": 1536,
        "attention": "dense",
        "seq_len": 32,
        "initial_batch_size": 2,
        "rampup_tokens": 768,
    },
    {
        "until_tokens": 3000,
        "attention": "dense",
        "source_weights": {"words": 2},
        "mtp_loss_weight": 0.2,
    },
    {"until_tokens": 4000, "attention": "warmup", "seq_len": 96, "global_batch_size": 2},
    {
        "until_tokens": 5000,
        "attention": "sparse",
        "seq_len": 96,
        "global_batch_size": 2,
        "router_bias_speed": 0.01,
    },
    {
        "until_tokens": 7000.0,
        "attention": "sparse",
        "seq_len": 192,
        "global_batch_size": 1,
        "micro_batch_size": 1,
    }
    | {"decay": True},
]


def phased(tiny: Path, folder: Path, phases: list[dict[str, Any]], **more: Any) -> Path:
    """The tiny run with these phases, in another file."""
    path = folder / "phased.yaml"
    values = {"base": str(tiny), "steps": 0, "phases": phases} | more
    path.write_text(yaml.safe_dump(values))
    return path


def test_everything_is_a_function_of_the_step(tiny: Path, tmp_path: Path) -> None:
    config = load_config(phased(tiny, tmp_path, CHANGING))
    recipe = config.recipe
    # A ramp of 768 / (32 x 3) = 8 steps of 2 rows, then 4 rows until 1,536 tokens.
    assert [phase.first for phase in recipe.phases] == [0, 16, 24, 29, 35]
    assert [phase.end for phase in recipe.phases] == [16, 24, 29, 35, 45]
    assert recipe.steps == 45 and config.steps == 0
    assert recipe.phases[0].tokens == 8 * 2 * 32 + 8 * 4 * 32
    counted = 0
    for phase in recipe.phases:
        settings = config.phases[phase.number]
        counted += phase.tokens
        rows = phase.rows
        assert counted >= settings.until_tokens > counted - rows.global_batch_size * rows.seq_len
    peak = config.optim.learning_rate
    rates = [recipe.learning_rate(step) for step in range(45)]
    assert rates[:2] == [peak / 2, peak] and set(rates[2:24]) == {peak}
    assert rates[24:29] == [1e-3] * 5 and rates[29:35] == [peak] * 6
    assert rates[35:] == sorted(rates[35:], reverse=True) and rates[44] == pytest.approx(peak / 10)
    weights = [recipe.mtp_loss_weight(step) for step in (0, 16, 23, 24, 34, 35)]
    assert weights == [0.3, 0.2, 0.2, 0.3, 0.3, 0.1]
    speeds = [recipe.at(step).router_bias_speed for step in (0, 24, 29, 40, 60)]
    assert speeds == [0.001, 0.0, 0.01, 0.001, 0.001]
    assert [recipe.at(step).attention for step in (23, 24, 28, 29)] == [
        *("dense", "warmup", "warmup", "sparse")
    ]
    assert recipe.phases[1].rows.source_weights == {"words": 2}
    assert config.segment.largest.number == 4 and config.segment.seq_len == 192
    again = load_config(write(config.to_yaml(), tmp_path))
    assert again.steps == again.recipe.steps == 45 and again.digest() == config.digest()


def write(text: str, folder: Path) -> Path:
    path = folder / "resolved.yaml"
    path.write_text(text)
    return path


def test_a_run_without_phases_is_one(tiny: Path) -> None:
    config = load_config(tiny, ["steps=20", "optim.schedule.decay_fraction=0.5"])
    recipe = config.recipe
    assert len(recipe.phases) == 1 and recipe.at(0) is recipe.at(100)
    assert recipe.at(0).rows == config.data.one_phase() and recipe.at(0).attention == "select"
    assert [recipe.mtp_loss_weight(step) for step in (9, 10)] == [0.3, 0.1]
    assert not recipe.warnings()


def test_a_recipe_is_resolved_once_and_belongs_to_its_config(tiny: Path) -> None:
    config, other = load_config(tiny), load_config(tiny)
    assert config.recipe is config.recipe and config.recipe.steps == config.steps
    del other.__dict__["recipe"]
    assert config == other and config.digest() == other.digest()
    assert "recipe" not in config.model_dump() and "recipe" not in config.model_dump_json()
    longer = config.model_copy(update={"steps": 9})
    assert longer.recipe.steps == 9 and longer.recipe is not config.recipe
    assert config.alone().recipe is not config.recipe


def change(number: int, **fields: Any) -> list[dict[str, Any]]:
    """The phases above, one of them changed."""
    phases = [dict(phase) for phase in CHANGING]
    phases[number] |= fields
    return phases


@pytest.mark.parametrize(
    ("phases", "more", "message"),
    [
        (change(4, seq_len=64), {}, r"phases.4.seq_len = 64 is shorter than the 96 of"),
        (
            change(2, until_tokens=2900),
            {},
            "phases.2.until_tokens = 2,900 overlaps what comes before, which",
        ),
        (change(1, until_tokens=1530), {}, "phases.1.until_tokens = 1,530 overlaps"),
        (change(1, until_tokens=1536), {}, "phases.1.until_tokens = 1,536 overlaps"),
        (CHANGING, {"steps": 50}, "steps = 50, but the phases have 45: they should cover the run"),
        (CHANGING, {"steps": 40}, "steps = 40, but the phases have 45"),
        (CHANGING[:2] + CHANGING[3:], {}, "phases.2.attention = sparse should come after a phase"),
        (
            [*change(3, decay=True), {**CHANGING[4], "until_tokens": 8000, "decay": False}],
            {},
            "decay",
        ),
        (change(0, rampup_tokens=None), {}, "a ramp needs both"),
        (
            change(0, initial_batch_size=5),
            {},
            "initial_batch_size = 5 should be less than the rows",
        ),
        (
            change(0, initial_batch_size=3),
            {},
            r"phases.0.initial_batch_size = 3 should be a multiple of phases.0.mi",
        ),
        (change(0, rampup_tokens=4000), {}, "rampup_tokens = 4,000 are more than the phase's"),
        (change(2, mtp_loss_weight=0.1), {}, "mtp_loss_weight has no effect with attention"),
        (
            change(1, source_weights={"word": 1}),
            {},
            "phases.1: source_weights names 'word'; the sources are",
        ),
        (change(4, seq_len=8192), {}, "phases.4.seq_len = 8192 should be at most model.max"),
        (change(4, seq_len=193), {"parallel": {"tensor": 2}}, "phases.4.seq_len = 193 does"),
        (
            change(0, global_batch_size=3),
            {},
            "phases.0.global_batch_size = 3 should be a multiple of",
        ),
        (
            change(0, until_tokens=0),
            {},
            "phases.0.until_tokens = 0 should be greater than 0",
        ),
        (CHANGING, {"optim": {"schedule": {"decay_fraction": 0.1}}}, "decay_fraction = 0.1 and a"),
        (CHANGING, {"optim": {"schedule": {"warmup_steps": 40}}}, "warmup_steps = 40 reaches into"),
        (CHANGING, {"model": {"layer_types": ["window", "hca", "hca"]}}, "has no csa layer"),
        (CHANGING, {"engine": "deepspeed"}, "phases are not supported with engine = deepspeed"),
        ([], {}, "the key 'steps' is missing"),
    ],
)
def test_refused(
    tiny: Path, tmp_path: Path, phases: list[dict[str, Any]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(phased(tiny, tmp_path, phases, **more))
    assert "\n" not in str(caught.value)


def test_every_step_of_a_ramp_must_fit_the_processes(tiny: Path, tmp_path: Path) -> None:
    config = load_config(phased(tiny, tmp_path, change(0, micro_batch_size=1)))
    config.check_world(1)
    with pytest.raises(ConfigError, match=r"rows of phases.0's ramp = 2 should be at least .* 3"):
        config.check_world(3)
    with pytest.raises(
        ConfigError, match=r"fewer than the 2 .* rows of phases.0's ramp should be at least 4"
    ):
        path = phased(tiny, tmp_path, change(2, global_batch_size=3, micro_batch_size=1))
        load_config(path, ["parallel.pipeline=2", "data.micro_batch_size=1"]).check_world(4)


def test_a_topk_above_the_entries_is_warned_about_once(tiny: Path, tmp_path: Path) -> None:
    path = phased(tiny, tmp_path, CHANGING)
    assert not load_config(path).recipe.warnings()
    for topk in (64, 24):
        (warning,) = load_config(path, [f"model.index_topk={topk}"]).recipe.warnings()
        assert f"rows of 96 have 24 entries and model.index_topk is {topk}" in warning
    assert not load_config(path, ["model.index_topk=23"]).recipe.warnings()


def test_a_source_without_a_weight_is_named(tiny: Path, tmp_path: Path) -> None:
    """A source that is added later is never read where the weights do not name it."""
    sources = "data.sources=[{name: words, paths: [a]}, {name: new, paths: [b]}, {name: held, "
    sources += "paths: [c], split: validation}]"
    weights = "data.source_weights={words: 1}"
    assert not load_config(tiny, [sources]).recipe.warnings()
    (warning,) = load_config(tiny, [sources, weights]).recipe.warnings()
    assert warning.startswith("data.source_weights does not name new: nothing of it is read")
    assert not load_config(
        tiny, [sources, "data.source_weights={words: 1, new: 0}"]
    ).recipe.warnings()
    path = phased(tiny, tmp_path, change(1, source_weights={"words": 2}))
    (warning,) = load_config(path, [sources]).recipe.warnings()
    assert warning.startswith("phases.1.source_weights does not name new")
