"""The check of one operation, in Triton's interpreter: true kernels pass, broken ones do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import ModelConfig
from model.kernel_cases import CASES
from model.kernels.operations import OPERATIONS, Choice
from tests.model.kernels.interpreter import interpreted
from tests.model.tiny import tiny_config
from tests.trainer.kernels.broken import broken
from trainer.kernels import compare, examine
from trainer.kernels.examine import Bench, candidates_of, check_operation
from trainer.kernels.fit import Variant
from trainer.kernels.verdict import Problem, Verdict

SAMPLES = (1, 2, 37, 3, 24)
MATRICES = ((24, 40), (40, 24))
SLOW = ("attention", "indexer_loss")


def same_time(calls: Sequence[Callable[[], object]]) -> list[float]:
    """A clock on which all calls take as long; the comparison has run them already."""
    return [1000.0] * len(calls)


def nothing_compiled(call: Callable[[], object]) -> list[Variant]:
    """The interpreter compiles nothing."""
    return []


BENCH = Bench(
    torch.device("cpu"), nothing_compiled, lambda variants: None, same_time, 0, SAMPLES, seeds=(0,)
)


def problem_of(operation: str, **changes: Any) -> Problem:
    """A tiny model. The interpreter truncates numbers to bf16, fp16 it rounds; FP8 takes fp32."""
    config = tiny_config(
        head_dim=64, qk_rope_head_dim=16, hc_sinkhorn_iters=3, max_position_embeddings=40
    )
    dtype = "float32" if operation == "fp8" else "float16"
    problem = Problem(config.model_dump(), dtype, 40, (operation,), MATRICES, "float16")
    return replace(problem, **changes)


def first_triton(operation: str, config: ModelConfig) -> list[Choice]:
    """Triton with its own block sizes alone."""
    return candidates_of(operation, config)[:1]


def verdict_on(operation: str, bench: Bench = BENCH, **changes: Any) -> Verdict:
    return check_operation(operation, problem_of(operation, **changes), bench, first_triton)


def test_every_operation_has_cases():
    assert {*CASES, "syrk"} == set(OPERATIONS)


@pytest.mark.parametrize(
    "operation",
    [pytest.param(o, marks=pytest.mark.slow) if o in SLOW else o for o in OPERATIONS],
)
@interpreted
def test_true_kernels_pass(operation):
    # A program of selected entries has one token: fewer of them take less time.
    samples = (1, 2, 21, 3) if operation == "attention" else SAMPLES
    verdict = verdict_on(operation, replace(BENCH, samples=samples))
    assert verdict.passed, verdict.reason
    assert verdict.choice == "eager"  # as fast
    assert verdict.errors["triton"][0] < 1e-2


@pytest.mark.parametrize("operation", ["attention", "indexer", "indexer_loss"])
@interpreted
def test_true_kernels_pass_on_the_end_of_a_longer_row(operation):
    """Queries see entries that lie before their own tokens: 25 of them instead of 4."""
    config = tiny_config(head_dim=64, qk_rope_head_dim=16, max_position_embeddings=100)
    bench = replace(BENCH, samples=(1, 21, 3))
    verdict = verdict_on(operation, bench, model=config.model_dump(), micro_tokens=16)
    assert verdict.passed, verdict.reason


BROKEN = [
    (
        "attention",
        "model.kernels.attention.forward_triton",
        "total = total * rescale + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        "output has an error of",
    ),
    (
        "norms",
        "model.kernels.norm.norm_triton",
        "grad = (grad - y * (tl.sum(grad * y, 1) / DIM)[:, None]) * rstd",
        "grad = grad * rstd",
        "gradient of rows has an error of",
    ),
    (
        "indexer",
        "model.kernels.indexer.select_triton",
        "visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])",
        "visible = (n[None, :] >= low[:, None]) & (n[None, :] < end)",
        "has entries that their query does not see",
    ),
]


@pytest.mark.parametrize(("operation", "module", "line", "instead", "reason"), BROKEN)
@interpreted
def test_a_broken_kernel_is_refused(operation, module, line, instead, reason):
    with broken(module, line, instead):
        verdict = verdict_on(operation)
    assert not verdict.passed
    assert reason in verdict.reason, verdict.reason
    assert verdict.choice == "eager" and verdict.blocks == {}
    assert "\n" not in verdict.reason


@interpreted
def test_widths_that_a_kernel_does_not_support_are_the_reason():
    verdict = verdict_on("attention", model=tiny_config(head_dim=16).model_dump())
    assert not verdict.passed and verdict.choice == "eager"
    assert verdict.reason == (
        "csa layers: ValueError: head_dim is 16; Triton attention supports [64, 128, 256, 512]"
    )


@interpreted
def test_a_candidate_is_noted_while_it_is_tried_and_refused_where_it_crashed():
    """Of two block sizes, the first has crashed an earlier process."""
    notes: list[tuple[int | None, str]] = []
    bench = replace(
        BENCH,
        samples=(3,),
        note=lambda index, what: notes.append((index, what)),
        refused={0: "it crashed"},
    )
    verdict = check_operation("compressor", problem_of("compressor"), bench, two_triton)
    assert verdict.passed and verdict.blocks == candidates("compressor")[1].blocks
    assert {(1, "runs"), (1, "compiles"), (None, "")} == set(notes) and notes[-1] == (None, "")
    with pytest.raises(KeyboardInterrupt), bench.trying(1):
        raise KeyboardInterrupt
    assert notes[-1] == (1, "runs")


def candidates(operation: str) -> list[Choice]:
    return candidates_of(operation, ModelConfig(**problem_of(operation).model))


def two_triton(operation: str, config: ModelConfig) -> list[Choice]:
    return candidates_of(operation, config)[:2]


@interpreted
def test_a_microbatch_whose_truth_does_not_fit_is_halved(monkeypatch):
    tokens: list[int] = []

    def reference_of(case):
        tokens.append(next(iter(case.leaves.values())).shape[0])
        if tokens[-1] == 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compare.reference_of(case)

    monkeypatch.setattr(examine, "reference_of", reference_of)
    verdict = verdict_on("swiglu")
    assert verdict.passed and not verdict.is_temporary, verdict.reason
    assert 40 in tokens and 20 in tokens, tokens
