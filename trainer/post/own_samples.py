"""The batches of a run that trains on its own samples; takes the place of the reader of shards.

The samples of a rollout are a function of the weights, the seed and the step at which it begins. A
resume at that step samples the same again; one between two steps of the same rollout reads its
file, since the weights that it was sampled with are gone.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch

from data import Batch, Tokenizer
from trainer.checkpoint import checkpoints_in, step_of
from trainer.config import Phase, RunConfig
from trainer.config.post import PostConfig
from trainer.device import processes_of_host
from trainer.engine import Engine
from trainer.parallel.collectives import all_gather_objects, broadcast_object
from trainer.parallel.grid import Grid
from trainer.post.advantages import group_advantages, length_penalty
from trainer.post.answer import Answer, SamplingSettings
from trainer.post.checkers import CheckerPool, Response, Score, read_response
from trainer.post.objective import PolicyObjective
from trainer.post.prompts import Prompt, Prompts
from trainer.post.rollout import RolloutFiles, Sample
from trainer.post.rows import batches_of
from trainer.post.sampling import sample_answers
from trainer.process.heartbeat import Heartbeat


class OwnSamples:
    """Samples answers, has them checked, and packs them into batches; all ranks do it together.

    Attributes:
        objective: the loss of these batches.

    Raises ConfigError for prompts, and PostTrainingError for checkers, that cannot be used.
    """

    def __init__(
        self, config: RunConfig, grid: Grid, tokenizer: Tokenizer, heartbeat: Heartbeat
    ) -> None:
        assert config.post is not None
        self._config, self._post, self._grid = config, config.post, grid
        self._tokenizer, self._heartbeat = tokenizer, heartbeat
        self._prompts = Prompts(config, tokenizer)
        self._checkers = _open_checkers(config.post)
        post = config.post
        self._files = RolloutFiles(config.run_dir, post.keep_rollouts, post.steps_per_rollout)
        self._samples: list[Sample] = []
        self._first: int | None = None  # step at which the current rollout began
        self._seconds: dict[str, float] = {}
        self.objective = PolicyObjective(post, grid)

    def at(self, step: int, engine: Engine, phase: Phase) -> list[Batch]:
        """Returns this rank's microbatches of a step; every rank calls it before the step."""
        first = step - step % self._post.steps_per_rollout
        self._seconds = {}
        if first == step:
            self._samples = self._make(step, engine, phase)
            if self._grid.is_first:
                saved = [step_of(path) for path in checkpoints_in(self._config.checkpoints)]
                self._files.write(step, self._samples, saved)
        elif self._first != first:
            samples = self._files.read(first) if self._grid.is_first else None
            self._samples = broadcast_object(samples, self._grid.world)
        self._first = first
        data, pad = self._grid.data, self._config.model.pad_token_id
        multiple = self._grid.pipeline.size
        return batches_of(self._samples, phase, data.rank, data.size, multiple, pad)

    def epochs_of(self, step: int) -> dict[str, float]:
        """Returns how often the steps before `step` have asked each domain's prompts, by name."""
        return self._prompts.epochs_of(step)

    def measures(self, step_seconds: float) -> dict[str, float]:
        """Returns what is measured about the step's samples and their loss; every rank calls it."""
        seconds = dict(self._seconds)
        seconds["train"] = step_seconds - sum(seconds.values())
        return {
            **_of_samples(self._samples),
            **self.objective.take(),
            "samples_per_second": len(self._samples) / step_seconds,
            **{f"seconds/{part}": value for part, value in seconds.items()},
        }

    def _make(self, step: int, engine: Engine, phase: Phase) -> list[Sample]:
        post = self._post
        prompts = self._prompts.of_rollout(step)
        stop = frozenset({self._tokenizer.eos_id})
        settings = SamplingSettings(
            post.samples_per_prompt, post.max_new_tokens, post.temperature, stop
        )
        start = time.perf_counter()

        def beat() -> None:
            self._heartbeat.enter("sampling")

        answers = sample_answers(engine, self._prompts, step, settings, phase, self._grid, beat)
        self._seconds["sample"] = time.perf_counter() - start
        start = time.perf_counter()
        checks = self._check(prompts, answers)
        self._seconds["check"] = time.perf_counter() - start
        return self._judge(prompts, answers, checks)

    def _check(self, prompts: Sequence[Prompt], answers: list[list[Answer]]) -> list[list[Score]]:
        """Returns what the checkers give each answer; ranks divide the answers."""
        pairs = [
            (prompt, answer)
            for prompt, group in zip(prompts, answers, strict=True)
            for answer in group
        ]
        world = self._grid.world
        checked = [
            (checker, self._response(prompt, answer))
            for prompt, answer in pairs[world.rank :: world.size]
            if (checker := self._post.domains[prompt.domain].checker) is not None
        ]
        scores = iter(self._checkers.score(checked, self._beat_check))
        local = [
            Score(0.0) if self._post.domains[prompt.domain].checker is None else next(scores)
            for prompt, _ in pairs[world.rank :: world.size]
        ]
        by_rank = all_gather_objects(local, world)
        flat = [by_rank[n % world.size][n // world.size] for n in range(len(pairs))]
        size = self._post.samples_per_prompt
        return [flat[first : first + size] for first in range(0, len(flat), size)]

    def _response(self, prompt: Prompt, answer: Answer) -> Response:
        is_text = isinstance(prompt.record.get("prompt"), str)
        effort = None if is_text else prompt.effort
        question = prompt.ids[1:]  # without bos
        return read_response(question, answer.ids, self._tokenizer, effort, prompt.record)

    def _beat_check(self) -> None:
        self._heartbeat.enter("checking answers")

    def _text(self, answer: Answer) -> str:
        """Returns an answer as text, special tokens included, without its eos."""
        is_finished = answer.ids[-1] == self._tokenizer.eos_id
        return self._tokenizer.decode(answer.ids[:-1] if is_finished else answer.ids)

    def _judge(
        self, prompts: Sequence[Prompt], answers: list[list[Answer]], checks: list[list[Score]]
    ) -> list[Sample]:
        """Puts rewards and advantages to the answers."""
        length = self._post.policy.length
        rewards = [
            [
                check.reward - length_penalty(len(answer.ids), prompt.effort, length)
                for answer, check in zip(group, of_group, strict=True)
            ]
            for prompt, group, of_group in zip(prompts, answers, checks, strict=True)
        ]
        advantages = group_advantages(torch.tensor(rewards), self._post.policy.divide_by_std)
        return [
            Sample(
                domain=self._post.domains[prompt.domain].name,
                effort=prompt.effort,
                prompt=number,
                line=prompt.line,
                question=self._tokenizer.decode(prompt.ids),
                text=self._text(answer),
                score=checks[number][k].reward,
                reward=rewards[number][k],
                advantage=float(advantages[number, k]),
                finished=answer.ids[-1] == self._tokenizer.eos_id,
                problem=checks[number][k].failure or None,
                prompt_ids=prompt.ids,
                ids=answer.ids,
                log_probabilities=answer.log_probabilities,
            )
            for number, prompt in enumerate(prompts)
            for k, answer in enumerate(answers[number])
        ]


def _open_checkers(post: PostConfig) -> CheckerPool:
    workers = max(len(os.sched_getaffinity(0)) // processes_of_host(), 1)
    return CheckerPool(
        {domain.checker for domain in post.domains if domain.checker is not None},
        post.sandbox,
        post.checker_workers or workers,
        post.checker_seconds,
    )


def _of_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns means over a rollout: of all samples, by domain, and by domain and mode."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    by_prompt: dict[int, set[float]] = defaultdict(set)
    for sample in samples:
        groups[sample.domain].append(sample)
        groups[f"{sample.domain}/{sample.effort}"].append(sample)
        by_prompt[sample.prompt].add(sample.reward)
    tokens = [value for sample in samples for value in sample.log_probabilities]
    measures = {
        "equal_groups": fmean(len(rewards) == 1 for rewards in by_prompt.values()),
        "entropy": -fmean(tokens),  # an unbiased estimate, since tokens are drawn by these
        "checker_problems": float(sum(sample.problem is not None for sample in samples)),
    }
    for name, group in groups.items():
        measures[f"score/{name}"] = fmean(sample.score for sample in group)
        measures[f"reward/{name}"] = fmean(sample.reward for sample in group)
        measures[f"length/{name}"] = fmean(len(sample.ids) for sample in group)
        measures[f"finished/{name}"] = fmean(sample.finished for sample in group)
    return measures
