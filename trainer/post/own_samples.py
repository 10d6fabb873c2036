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
from torch import Tensor

from data import Batch, Tokenizer
from model.kernels.operations import Kernels
from trainer.checkpoint import checkpoints_in, step_of
from trainer.config import Phase, RunConfig
from trainer.config.post import PostConfig
from trainer.device import processes_of_host
from trainer.engine import Engine
from trainer.generate.stored import ModelReader
from trainer.parallel.collectives import all_gather_objects, broadcast_object
from trainer.parallel.grid import Grid
from trainer.post.advantages import group_advantages, length_penalty
from trainer.post.answer import Answer, SamplingSettings
from trainer.post.checkers import CheckerPool, Response, Score, read_response
from trainer.post.chosen_tokens import log_probabilities
from trainer.post.objective import (
    DistillationObjective,
    OwnObjective,
    PolicyObjective,
    TeacherHidden,
)
from trainer.post.prompts import Prompt, Prompts
from trainer.post.rollout import RolloutFiles, Sample
from trainer.post.rows import batches_of, numbered
from trainer.post.sampling import sample_answers
from trainer.post.teachers import Teachers
from trainer.process.heartbeat import Heartbeat


class OwnSamples:
    """Samples answers, has them checked, and packs them into batches; all ranks do it together.

    Attributes:
        objective: the loss of these batches.

    Raises ConfigError for prompts, and PostTrainingError for checkers and teachers, that cannot be
    used, and the errors of `read_model`.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        tokenizer: Tokenizer,
        heartbeat: Heartbeat,
        kernels: Kernels,
        read_model: ModelReader | None,
    ) -> None:
        assert config.post is not None and (read_model or not config.post.models)
        self._config, self._post, self._grid = config, config.post, grid
        self._tokenizer, self._heartbeat = tokenizer, heartbeat
        self._prompts = Prompts(config, tokenizer)
        self._checkers = _open_checkers(config.post)
        post = config.post
        self._files = RolloutFiles(config.run_dir, post.keep_rollouts, post.steps_per_rollout)
        self._samples: list[Sample] = []
        self._first: int | None = None  # step at which the current rollout began
        self._seconds: dict[str, float] = {}
        self._teachers = Teachers(config, grid, tokenizer, kernels, read_model)
        self._batches: tuple[tuple[int, int], list[Batch]] | None = None
        self.objective: OwnObjective = (
            PolicyObjective(post, grid)
            if post.method == "reinforce"
            else DistillationObjective(post, grid)
        )

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
        if self._batches is None or self._batches[0] != (first, phase.number):
            self._batches = (first, phase.number), self._scored(phase)
        return self._batches[1]

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

    def _scored(self, phase: Phase) -> list[Batch]:
        """Returns this rank's microbatches; other models score them for the objective.

        A microbatch has samples of one teacher only.
        """
        post, objective = self._post, self.objective
        if isinstance(objective, DistillationObjective):
            batches: list[Batch] = []
            hidden: list[TeacherHidden] = []
            start = time.perf_counter()
            for folder in post.models:
                domains = {domain.name for domain in post.domains if domain.teacher == folder}
                samples = [x for x in self._samples if x.domain in domains]
                if not samples:  # their weight is 0
                    continue
                own = self._pack(samples, phase)
                self._heartbeat.enter("scoring")
                kept = self._teachers.read(folder, own, lambda hidden_nD, *_: hidden_nD)
                hidden += [TeacherHidden(x, self._teachers.head(folder)) for x in kept]
                batches += own
            objective.teachers = hidden
            self._seconds["score"] = time.perf_counter() - start
            return numbered(batches)
        batches = self._pack(self._samples, phase)
        if post.reference is not None and isinstance(objective, PolicyObjective):
            start = time.perf_counter()
            self._heartbeat.enter("scoring")

            def log_p(hidden_nD: Tensor, weight_vD: Tensor, target_n: Tensor) -> Tensor:
                tensor = self._grid.tensor
                return log_probabilities(hidden_nD, weight_vD, target_n, tensor, post.temperature)

            objective.reference = self._teachers.read(post.reference, batches, log_p)
            self._seconds["score"] = time.perf_counter() - start
        return numbered(batches)

    def _pack(self, samples: Sequence[Sample], phase: Phase) -> list[Batch]:
        data, pad = self._grid.data, self._config.model.pad_token_id
        return batches_of(samples, phase, data.rank, data.size, self._grid.pipeline.size, pad)

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


def open_own_samples(
    config: RunConfig,
    grid: Grid,
    tokenizer: Tokenizer,
    heartbeat: Heartbeat,
    kernels: Kernels,
    read_model: ModelReader | None,
) -> OwnSamples | None:
    """Returns what a run with `post` trains on, None for one that trains on its shards.

    `read_model` opens the models that `post` names, if it names some.
    """
    if config.post is None:
        return None
    return OwnSamples(config, grid, tokenizer, heartbeat, kernels, read_model)


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
