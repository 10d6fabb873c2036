"""A rollout: the samples on which one or more steps train, and its file in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import write_atomically
from trainer.config import ConfigError

FOLDER = "rollouts"


@dataclass(frozen=True)
class Sample:
    """An answer of the model.

    Attributes:
        domain, effort: of its prompt.
        prompt: number of its prompt in the rollout; samples of the same one are a group.
        line: the prompt's line in its file, from 0.
        question, text: prompt and answer as text, special tokens included.
        prompt_ids, ids: their tokens.
        log_probabilities: of `ids` in the distributions that they were drawn from, in nats.
        finished: whether the answer ended before its limit.
        score: what the checker gave.
        reward: the score less the penalty for its length.
        advantage: the reward relative to its group's.
        problem: why the checker gave no score; null where it did.
    """

    domain: str
    effort: str
    prompt: int
    line: int
    question: str
    text: str
    score: float
    reward: float
    advantage: float
    finished: bool
    problem: str | None
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]

    @property
    def positions(self) -> int:
        """Positions that it takes in a row: its last token is no input."""
        return len(self.prompt_ids) + len(self.ids) - 1


class RolloutFiles:
    """`rollouts/` of a run folder: a file for every rollout, one JSON object for each sample.

    The newest stay, and those that a checkpoint in the middle of them resumes from.
    """

    def __init__(self, run_dir: Path, keep: int, steps_per_rollout: int) -> None:
        self._folder, self._keep, self._steps = run_dir / FOLDER, keep, steps_per_rollout

    def write(self, step: int, samples: Sequence[Sample], checkpoints: Sequence[int]) -> None:
        """Writes the rollout that begins at `step`, whole or not at all; removes old ones.

        `checkpoints`: steps of the checkpoints that exist.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in samples)
        write_atomically(self._path(step), text.encode())
        self._prune(step, checkpoints)

    def read(self, step: int) -> list[Sample]:
        """Returns the rollout that began at `step`. Raises ConfigError unless it is there whole."""
        path = self._path(step)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [_sample(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError):
            raise ConfigError(
                f"{path}: is missing or damaged, and the checkpoint was saved between the steps "
                "that train on it; resume from a checkpoint of another step"
            ) from None

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.jsonl"

    def _prune(self, newest: int, checkpoints: Sequence[int]) -> None:
        steps = sorted(self._rollouts())
        for step in [step for step in steps if step > newest]:  # undone by a resume
            self._path(step).unlink(missing_ok=True)
        old = [step for step in steps if step <= newest][: -self._keep]
        for step in old:
            if not any(step < saved < step + self._steps for saved in checkpoints):
                self._path(step).unlink(missing_ok=True)

    def _rollouts(self) -> Iterator[int]:
        for path in self._folder.glob("step-*.jsonl"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal():
                yield int(number)


def _sample(values: dict[str, Any]) -> Sample:
    lists = ("prompt_ids", "ids", "log_probabilities")
    return Sample(**{**values, **{name: tuple(values[name]) for name in lists}})
