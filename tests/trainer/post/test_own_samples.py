"""Runs that train on their own samples: what they log, and that a resume changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.post.reinforce import reinforcement
from tests.trainer.tiny import assert_same_run, column, saved_tensors, train
from trainer.config import ConfigError, load_config
from trainer.engine import Engine
from trainer.post import own_samples
from trainer.post.own_samples import OwnSamples
from trainer.post.prompts import Prompts
from trainer.post.rollout import RolloutFiles, Sample
from trainer.run_tokenizer import open_tokenizer

TWICE = ["steps=4", "checkpoint.every=1", "checkpoint.keep=0"]


def rollout(run_dir: Path, step: int) -> list[dict[str, Any]]:
    lines = (run_dir / "rollouts" / f"step-{step:08d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two rollouts."""
    folder = tmp_path_factory.mktemp("straight")
    train(tiny, folder / "run", *TWICE, *reinforcement(folder, steps_per_rollout=2))
    return folder / "run"


def test_the_file_of_a_rollout_has_what_was_trained_on(straight: Path) -> None:
    """Groups of a prompt, advantages that sum to 0 in them, and readable text."""
    samples = rollout(straight, 0)
    assert [sample["prompt"] for sample in samples] == [0] * 4 + [1] * 4
    for number in (0, 1):
        group = [sample for sample in samples if sample["prompt"] == number]
        assert abs(sum(sample["advantage"] for sample in group)) < 1e-12
        assert len({tuple(sample["ids"]) for sample in group}) == 4
    for sample in samples:
        assert sample["question"].endswith(("ab cd", "ef", "gh ab", "hh a", "b"))
        assert sample["score"] == sample["text"].count("a") / max(len(sample["text"]), 1)
        assert len(sample["ids"]) == len(sample["log_probabilities"]) <= 6


def test_what_is_logged(straight: Path) -> None:
    first, second, third, _ = column(straight, "post")
    # The same weights as those that sampled: only rounding is between the two.
    assert 0 < first["log_p_gap"] < 1e-5 and first["log_p_gap_max"] < 1e-4
    assert second["log_p_gap"] > 1e-4 > third["log_p_gap"]
    assert first["score/words"] == second["score/words"] != third["score/words"]
    assert first["length/words/none"] == first["length/words"] <= 6
    assert first["seconds/sample"] > 0 and "seconds/sample" not in second
    assert column(straight, "epochs") == [{"words": share} for share in (0.4, 0.4, 0.8, 0.8)]


@pytest.mark.parametrize(
    ("step", "moment"),
    [(2, "sample_answers"), (2, "_check"), (2, "forward_backward"), (3, "forward_backward")],
)
def test_a_run_that_dies_resumes_to_the_same_bits(
    straight: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    moment: str,
) -> None:
    """Step 2 samples again, step 3 reads the rollout of step 2, whose weights are gone."""
    overrides = [*TWICE, *reinforcement(tmp_path, steps_per_rollout=2)]
    places = {"_check": OwnSamples, "forward_backward": Engine, "sample_answers": own_samples}
    place: Any = places[moment]
    function = getattr(place, moment)
    at, steps = OwnSamples.at, [0]

    def counted(self: OwnSamples, now: int, *rest: Any) -> Any:
        steps[0] = now
        return at(self, now, *rest)

    def dies(*arguments: Any, **more: Any) -> Any:
        result = function(*arguments, **more)
        if steps[0] == step:
            raise RuntimeError("killed")
        return result

    with monkeypatch.context() as patched:
        patched.setattr(OwnSamples, "at", counted)
        patched.setattr(place, moment, dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(tiny, tmp_path / "run", *overrides)
    train(tiny, tmp_path / "run", *overrides)
    assert_same_run(straight, tmp_path / "run", 4)


def test_a_constant_reward_moves_nothing(tiny: Path, tmp_path: Path) -> None:
    """But for weight decay, the balance loss and routers' biases, which are off here."""
    still = [
        *("optim.muon.weight_decay=0", "optim.adamw.weight_decay=0"),
        *("model.balance_loss_weight=0", "router_bias_speed=0"),
        *("steps=2", "checkpoint.every=1"),
    ]
    run = train(tiny, tmp_path / "run", *still, *reinforcement(tmp_path, "constant")).run_dir
    assert column(run, "grad_norm") == [0.0, 0.0]
    assert column(run, "loss") == [0.0, 0.0]
    one, two = (saved_tensors(run / f"checkpoints/step-0000000{n}") for n in (1, 2))
    moved = [name for name in one if not torch.equal(one[name], two[name])]
    assert all(name.startswith("optim.step.") for name in moved)
    assert [post["equal_groups"] for post in column(run, "post")] == [1.0, 1.0]


def test_a_checker_that_raises_is_counted(tiny: Path, tmp_path: Path) -> None:
    overrides = reinforcement(tmp_path, "raises_on_a", max_new_tokens=20)
    run = train(tiny, tmp_path / "run", "steps=1", *overrides).run_dir
    samples = rollout(run, 0)
    failed = [sample for sample in samples if sample["problem"] is not None]
    assert failed and all("a" in sample["text"] and sample["score"] == 0 for sample in failed)
    assert failed[0]["problem"] == "it raised ValueError: no a is allowed"
    assert column(run, "post")[0]["checker_problems"] == len(failed)


def test_every_prompt_is_asked_once_an_epoch(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, reinforcement(tmp_path))
    prompts = Prompts(config, open_tokenizer(config))
    lines = [prompt.line for step in range(5) for prompt in prompts.of_rollout(step)]
    assert sorted(lines[:5]) == sorted(lines[5:]) == [0, 1, 2, 3, 4]
    assert lines[:5] != lines[5:]


def test_rollouts_that_a_checkpoint_needs_stay(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, keep=2, steps_per_rollout=2)
    sample = Sample("a", "none", 0, 0, "q", "t", 0.0, 0.0, 0.0, True, None, (1,), (2,), (-0.1,))
    for step in (0, 2, 4, 6, 8):
        files.write(step, [sample], checkpoints=[3, 4])
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == [f"step-{step:08d}.jsonl" for step in (2, 6, 8)]
    assert files.read(2) == [sample]
    files.write(2, [sample], checkpoints=[])  # a resume from before: later ones are undone
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-00000002.jsonl"]
    with pytest.raises(ConfigError, match=r"step-00000004\.jsonl: is missing or damaged"):
        files.read(4)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ('{"prompt": "a"}\n{"prompt"', r"prompts\.jsonl, line 2: is not JSON"),
        ("3", "line 1: is no JSON object"),
        ('{"text": "a"}', "line 1: has neither messages nor prompt, a text"),
        ("", "has no prompts, one JSON object on each line"),
        ('{"prompt": "' + "a " * 60 + '"}', "line 1: the prompt has .* tokens, and a row has room"),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}]}',
            "line 1: its last message is an answer",
        ),
        ('{"messages": [{"role": "teacher"}]}', "line 1: is not a conversation"),
    ],
)
def test_prompts_that_cannot_be_used(tiny: Path, tmp_path: Path, lines: str, text: str) -> None:
    overrides = reinforcement(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=text):
        train(tiny, tmp_path / "run", *overrides)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt = 1 leaves nothing to compare"),
        ({"max_new_tokens": 48}, r"post\.max_new_tokens = 48 should be less than the row length"),
        ({"efforts": {"high": 0}}, "the weights of efforts sum to 0"),
        ({"policy": {"kl_weight": 0.1}}, "needs a reference"),
        ({"method": "distil"}, "has no teacher, which method = distil"),
    ],
)
def test_configs_that_do_not_fit(
    tiny: Path, tmp_path: Path, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(tiny, reinforcement(tmp_path, **more))
