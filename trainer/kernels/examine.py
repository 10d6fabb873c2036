"""Checks one operation: does it fit, is it right, is it faster? Runs in the process that called."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import MappingProxyType

import torch

from model import ModelConfig
from model.kernel_cases import CASES, RAGGED, Case, MakeCase, Sizes
from model.kernels.operations import (
    BLOCKS_OF_TRITON,
    IMPLEMENTATIONS,
    LIBRARIES,
    Choice,
)
from trainer.kernels.compare import fault_of, reference_of, results
from trainer.kernels.fit import Variant
from trainer.kernels.syrk_cases import BLOCK_CHOICES, syrk_cases
from trainer.kernels.temporary import advice_on, describe_error, is_out_of_memory
from trainer.kernels.timing import MIN_GAIN, Clock, milliseconds
from trainer.kernels.verdict import Problem, Verdict

SEEDS = (0, 1, 2)
_MOST_BLOCKS = 3
"""Block sizes that are compared and timed: of those that fit, the first. Compiling takes most of a
check's time."""
_NOT_TRIED = "not tried, as enough others fit"
_LARGE_TOKENS = 8192
_LARGE_NUMBERS = 1 << 28
"""Of the queries: in fp32, with their gradients and eager copies, about 6 GiB."""


@dataclass(frozen=True)
class Bench:
    """Where an operation is checked.

    Attributes:
        record: (call) -> the variants of kernels that it would compile, as `fit.record_variants`.
        misfit: (variants) -> why one of them does not fit this device, or None.
        clock: measures a call.
        cache_bytes: of the device's last cache.
        samples: lengths of the ragged samples, at which the truth is float64.
        seeds: of the inputs there.
        note: called with the number of a candidate before it is compiled ("compiles") or runs
            ("runs"), and with None once it has come to an end.
        refused: reasons why candidates are not to be tried, by their number.
    """

    device: torch.device
    record: Callable[[Callable[[], object]], list[Variant]]
    misfit: Callable[[list[Variant]], str | None]
    clock: Clock
    cache_bytes: int
    samples: tuple[int, ...] = RAGGED
    seeds: tuple[int, ...] = SEEDS
    note: Callable[[int | None, str], None] = lambda index, what: None
    refused: Mapping[int, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def trying(self, index: int, what: str = "runs") -> Iterator[None]:
        """Notes a candidate until its end; the note stays where an error leaves this context."""
        self.note(index, what)
        yield
        self.note(None, "")


def cases_of(operation: str, problem: Problem, sizes: Sizes) -> Iterator[MakeCase]:
    """Yields what makes the operation's cases at these sizes."""
    if operation == "syrk":
        dtype = getattr(torch, problem.matrix_dtype)
        return syrk_cases(replace(sizes, dtype=dtype), problem.matrices)
    return CASES[operation].cases(sizes)


def candidates_of(operation: str, config: ModelConfig) -> list[Choice]:
    """Returns what may replace the eager version: Triton with its block sizes, and others."""
    blocks = BLOCK_CHOICES if operation == "syrk" else CASES[operation].block_choices(config)
    candidates = [Choice("triton", some) for some in blocks]
    for name in IMPLEMENTATIONS[operation]:
        if name in BLOCKS_OF_TRITON[1:]:
            candidates += [Choice(name, some) for some in blocks]
        elif name not in ("eager", "triton"):
            candidates.append(Choice(name))
    return candidates


def sizes_of(problem: Problem, bench: Bench) -> tuple[Sizes, Sizes]:
    """Returns the ragged samples, and a microbatch, cut so that its fp32 truth fits in memory.

    Of a row that is longer, the microbatch has the last tokens, which see the most entries.
    """
    config = ModelConfig(**problem.model)
    dtype = getattr(torch, problem.dtype)
    ragged = Sizes(
        config,
        bench.samples,
        dtype,
        bench.device,
        deterministic=problem.deterministic,
        dense=True,
        tensor=problem.tensor,
        expert_tensor=problem.expert_tensor,
    )
    most = _LARGE_NUMBERS // (config.num_attention_heads * config.head_dim)
    tokens = max(min(problem.micro_tokens, _LARGE_TOKENS, most), 1)
    row = config.max_position_embeddings
    full, rest = divmod(tokens, min(row, tokens))
    samples = (row,) * full if full > 1 else (tokens - rest,)
    samples += (rest,) * (rest > 0)
    return ragged, replace(ragged, samples=samples, dense=False, earlier=max(row - tokens, 0))


class Examination:
    """The candidates of an operation: why each was refused, and errors and times of the others."""

    def __init__(
        self, candidates: Sequence[Choice], refused: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.refused = {**refused}
        self.temporary: set[int] = set()
        self.candidates = candidates
        self.errors: dict[int, tuple[float, float]] = {}
        self.times: dict[int, float] = dict.fromkeys(range(len(candidates)), 0.0)
        self.eager_errors = (math.nan, math.nan)
        self.eager_time = 0.0

    @property
    def remaining(self) -> list[tuple[int, Choice]]:
        """Those not refused yet."""
        return [(i, c) for i, c in enumerate(self.candidates) if i not in self.refused]

    def fit(self, makers: Iterable[MakeCase], bench: Bench) -> None:
        """Refuses libraries that are not installed, and Triton kernels that do not fit.

        Or that raise an error.
        """
        for index, candidate in self.remaining:
            name = candidate.name
            if name in LIBRARIES and importlib.util.find_spec(name) is None:
                self.refused[index] = "it is not installed"
        variants: dict[int, list[Variant]] = {
            index: [] for index, candidate in self.remaining if candidate.name in BLOCKS_OF_TRITON
        }
        for make in makers:
            case = make()
            for index in [index for index in variants if index not in self.refused]:
                call = partial(results, case, case.function(self.candidates[index]))
                with bench.trying(index):
                    try:
                        variants[index] += bench.record(call)
                    except Exception as error:  # what the kernel's function does not support
                        self._refuse(index, case, error)
        fitting = dict.fromkeys(BLOCKS_OF_TRITON, 0)
        for index, recorded in variants.items():
            if index in self.refused:
                continue
            name = self.candidates[index].name
            if fitting[name] == _MOST_BLOCKS:
                self.refused[index] = _NOT_TRIED
                continue
            unique = {variant.key: variant for variant in recorded}  # cases share kernels
            with bench.trying(index, "compiles"):
                reason = bench.misfit(list(unique.values()))
            if reason is not None:
                self.refused[index] = reason
            else:
                fitting[name] += 1

    def _refuse(self, index: int, case: Case, error: Exception) -> None:
        """Refuses a candidate; raises the error if the device can no longer be used."""
        self.refused[index] = _failure(case, error)
        if advice_on(error) is not None:
            self.temporary.add(index)

    def compare(self, case: Case, bench: Bench) -> None:
        """Refuses candidates that are wrong on a case."""
        reference = reference_of(case)
        self.eager_errors = _largest(self.eager_errors, reference.errors)
        for index, candidate in self.remaining:
            with bench.trying(index):
                try:
                    fault, errors = fault_of(case, case.function(candidate), reference)
                except Exception as error:
                    self._refuse(index, case, error)
                    continue
            self.errors[index] = _largest(self.errors.get(index, (math.nan, math.nan)), errors)
            if fault is not None:
                self.refused[index] = f"{case.name}: {fault}"

    def time(self, case: Case, bench: Bench) -> None:
        """Adds a case's times, weighted by how often a model runs it."""
        if not case.weight:
            return
        clock, cache = bench.clock, bench.cache_bytes
        self.eager_time += case.weight * milliseconds(case, case.eager, clock, cache)
        for index, candidate in self.remaining:
            with bench.trying(index):
                try:
                    time = milliseconds(case, case.function(candidate), clock, cache)
                except Exception as error:
                    self._refuse(index, case, error)
                    continue
            self.times[index] += case.weight * time

    def verdict(self, operation: str) -> Verdict:
        """Chooses the fastest of eager and the candidates that passed."""
        remaining = self.remaining
        best = {
            name: min((i for i, c in remaining if c.name == name), key=self.times.__getitem__)
            for name in dict.fromkeys(c.name for _, c in remaining)
        }
        refused = self._refused_others(best)
        blocks = self.candidates[best["triton"]].blocks if "triton" in best else {}
        for name in BLOCKS_OF_TRITON[1:]:  # with Triton's block sizes, or not at all
            same = [i for i, c in remaining if c.name == name and c.blocks == blocks]
            if name in best and "triton" in best and same:
                best[name] = same[0]
            elif best.pop(name, None) is not None:
                refused[name] = "fails with the block sizes of the Triton kernels, its backward"
        times = {"eager": self.eager_time} | {name: self.times[i] for name, i in best.items()}
        errors = {"eager": self.eager_errors} | {name: self.errors[i] for name, i in best.items()}
        choice = min(times, key=times.__getitem__)
        if times[choice] > (1 - MIN_GAIN) * self.eager_time:
            choice = "eager"
        passed = "triton" in best
        return Verdict(
            operation,
            passed,
            self._reason(choice, times) if passed else self._refusal(),
            choice,
            dict(blocks),
            errors,
            times,
            refused,
            not passed and any(self.candidates[index].name == "triton" for index in self.temporary),
        )

    def _refused_others(self, passed: Container[str]) -> dict[str, str]:
        """Returns the first reason for each implementation but Triton's that did not pass."""
        refused: dict[str, str] = {}
        for index, candidate in enumerate(self.candidates):
            if candidate.name != "triton" and candidate.name not in passed:
                refused.setdefault(candidate.name, self.refused[index])
        return refused

    def _reason(self, choice: str, times: dict[str, float]) -> str:
        if choice != "eager":
            return f"{choice} is {times['eager'] / times[choice]:.2f} times as fast as eager"
        second = min((n for n in times if n != "eager"), key=times.__getitem__)
        return f"{second} takes {times[second] / times['eager']:.2f} times as long as eager"

    def _refusal(self) -> str:
        """Returns why the kernel failed with its own block sizes, and how many others did."""
        reasons = [self.refused[i] for i, c in enumerate(self.candidates) if c.name == "triton"]
        others = sum(reason != _NOT_TRIED for reason in reasons[1:])
        return reasons[0] + (f"; {others} other block sizes fail as well" if others else "")


def check_operation(
    operation: str,
    problem: Problem,
    bench: Bench,
    candidates: Callable[[str, ModelConfig], list[Choice]] = candidates_of,
) -> Verdict:
    """Returns the verdict on one operation.

    First every candidate is compiled and compared with the GPU's limits, for both sizes: whether
    a size is a multiple of 16 decides what a kernel loads ahead. Then candidates are compared with
    the truth on ragged samples and on one microbatch, and timed on the microbatch.

    Raises:
        Exception: the eager version failed, or the GPU can no longer be used.
    """
    ragged, large = sizes_of(problem, bench)
    examination = Examination(candidates(operation, ragged.config), bench.refused)
    both = [cases_of(operation, problem, sizes) for sizes in (ragged, large)]
    examination.fit(chain(*both), bench)
    for seed in bench.seeds:
        for make in cases_of(operation, problem, replace(ragged, seed=seed)):
            if examination.remaining:
                examination.compare(make(), bench)
    while not _passes_microbatch(examination, operation, problem, large, bench):
        problem = replace(problem, micro_tokens=sum(large.samples) // 2)
        _, large = sizes_of(problem, bench)
    return examination.verdict(operation)


def _passes_microbatch(
    examination: Examination, operation: str, problem: Problem, large: Sizes, bench: Bench
) -> bool:
    """Compares and times the candidates on a microbatch; whether its truth fits in memory.

    Raises OutOfMemoryError where that of a single token does not.
    """
    examination.times = dict.fromkeys(examination.times, 0.0)
    examination.eager_time = 0.0
    try:
        for make in cases_of(operation, problem, large):
            if examination.remaining:
                case = make()
                examination.compare(case, bench)
                examination.time(case, bench)
    except Exception as error:
        if not is_out_of_memory(error) or sum(large.samples) == 1:
            raise
    else:
        return True
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def _largest(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Returns the larger error of outputs and of gradients; NaN stands for none."""
    outputs, gradients = zip(one, other, strict=True)
    return _max(outputs), _max(gradients)


def _max(errors: tuple[float, ...]) -> float:
    return max((x for x in errors if not math.isnan(x)), default=math.nan)


def _failure(case: Case, error: Exception) -> str:
    """Describes an exception; raises an error if the device can no longer be used."""
    device = next(iter(case.leaves.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return f"{case.name}: {describe_error(error)}"
