"""Fused loops for a CPU: the same numbers on any threads, and plain torch where they cannot run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from torch import Tensor

from model.kernels import host
from model.kernels.attention import AttentionInputs, AttentionRanges, attention_with_lse2
from model.kernels.attention.naive import naive_attention, naive_selection_mask
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.hyper_connection import read_streams, write_streams
from model.kernels.hyper_connection.naive import naive_read_streams, naive_write_streams
from model.kernels.norm import rms_norm, rotate
from model.kernels.norm.naive import naive_rms_norm, naive_rotate
from model.kernels.permute import unpermute_rows
from model.kernels.router import route, sample_sums
from model.kernels.swiglu import clamped_swiglu
from model.kernels.swiglu.naive import naive_clamped_swiglu
from tests.model.kernels.compare import rand
from tests.model.kernels.norm.test_norm_triton import turn

Case = tuple[Callable[..., object], Callable[..., object], list[Tensor]]
"""Kernel, formula, inputs."""
TOKENS, STREAMS, DIM = 70, 4, 24


def read_case(tokens: int = TOKENS) -> Case:
    rows = (2 + STREAMS) * STREAMS
    fn = rand(rows, STREAMS * DIM, seed=2, scale=0.1)
    streams = rand(tokens, STREAMS, DIM, seed=1)
    return (
        lambda *x: read_streams(*x, norm_eps=1e-6, hc_eps=1e-6, iterations=20),
        lambda *x: naive_read_streams(*x, 1e-6, 1e-6, 20),
        [streams, fn, rand(rows, seed=3), rand(3, seed=4)],
    )


def write_case(tokens: int = TOKENS) -> Case:
    inputs = [
        rand(tokens, STREAMS, DIM, seed=1),
        rand(tokens, DIM, seed=2),
        rand(tokens, STREAMS, seed=3),
        rand(tokens, STREAMS, STREAMS, seed=4),
    ]
    return write_streams, naive_write_streams, inputs


def norm_case(tokens: int = TOKENS, rotary: int = 0) -> Case:
    rotation = turn(tokens, rotary) if rotary else None
    return (
        lambda *x: rms_norm(*x, 1e-6, rotation),
        lambda *x: naive_rms_norm(*x, 1e-6, rotation),
        [rand(tokens, DIM, seed=1), rand(DIM, seed=2)],
    )


def rotation_case(tokens: int = TOKENS) -> Case:
    rotation = turn(tokens, 6)
    inputs = [rand(tokens, 3, DIM, seed=1)]
    return lambda x: rotate(x, rotation), lambda x: naive_rotate(x, rotation), inputs


def swiglu_case(tokens: int = TOKENS) -> Case:
    inputs = [rand(tokens, DIM, seed=1, scale=2), rand(tokens, DIM, seed=2), rand(tokens, seed=3)]
    return (
        lambda g, u, w: clamped_swiglu(g, u, 1.5, w),
        lambda g, u, w: naive_clamped_swiglu(g, u, 1.5, w),
        inputs,
    )


def attention_case(tokens: int = TOKENS, selected: int = 0) -> Case:
    """A window of 12 tokens, entries of 4, all visible ones or those selected."""
    heads, dim, window, entries = 2, 16, 12, tokens // 4
    place = np.arange(tokens)
    start, end = np.zeros(tokens, np.int64), (place + 1) // 4
    low = torch.tensor(np.maximum(place - window + 1, 0))
    ranges = AttentionRanges(
        low, ((0, tokens, 0),), torch.tensor(start), torch.tensor(end), start, end
    )
    index = torch.arange(selected) * 2 if selected else None
    choice = None
    if index is not None:
        few = torch.tensor(end)[:, None] <= selected
        columns = torch.where(few, torch.arange(selected), index)
        choice = torch.where(columns < torch.tensor(end)[:, None], columns, -1).to(torch.int32)
    rotation = turn(tokens, 6)
    key, query = torch.arange(tokens), torch.arange(tokens)[:, None]
    sees_token = (key >= low[:, None]) & (key <= query)
    sees_entry = torch.arange(entries) < torch.tensor(end)[:, None]
    if choice is not None:
        sees_entry = naive_selection_mask(choice, entries)

    def kernel(*tensors: Tensor) -> Tensor:
        inputs = AttentionInputs(*tensors, rotation, ranges, choice, window=window, norm_eps=1e-6)
        return attention_with_lse2(inputs)[0]

    return (
        kernel,
        lambda *x: naive_attention(*x, rotation, sees_token, sees_entry, 1e-6),
        [
            rand(tokens, heads, dim, seed=1),
            rand(tokens, dim, seed=2),
            rand(entries, dim, seed=3),
            rand(heads, seed=4),
        ],
    )


def route_case(tokens: int = TOKENS) -> Case:
    """Scores and weights of three of seven experts."""
    bias = rand(7, seed=2, scale=0.1)

    def formula(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.nn.functional.softplus(logits).sqrt()
        selected = scores.gather(1, (scores + bias).topk(3).indices)
        return scores, selected / selected.sum(1, keepdim=True) * 1.5

    def kernel(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, _, weights = route(logits, bias, None, 3, 1.5)
        return scores, weights

    return kernel, formula, [rand(tokens, 7, seed=1, scale=3)]


def sample_case(tokens: int = TOKENS) -> Case:
    """Shares of experts in three samples."""
    sample = torch.arange(tokens) * 3 // max(tokens, 1)
    indices, slots = torch.zeros(tokens, 2, dtype=torch.int64), sample[:, None] * 7
    return (
        lambda x: sample_sums(x.exp(), indices, sample, 3, slots, torch.ones(2 * tokens))[0],
        lambda x: x.new_zeros(3, 7).index_add(0, sample, x.exp() / x.exp().sum(1, keepdim=True)),
        [rand(tokens, 7, seed=1)],
    )


def unpermute_case(tokens: int = TOKENS) -> Case:
    order = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(1))
    return (
        lambda y: unpermute_rows(y, order.argsort() // 3, order, tokens),
        lambda y: y[order].view(tokens, 3, -1).sum(1),
        [rand(3 * tokens, DIM, seed=2)],
    )


def cross_entropy_case(tokens: int = TOKENS) -> Case:
    """A vocabulary that 16 does not divide, and some tokens without a target."""
    target = torch.arange(tokens) * 7 % 37
    target[::5] = -100
    kernel = partial(linear_cross_entropy, target_T=target, denominator=50, ignore_index=-100)

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return torch.nn.functional.cross_entropy(logits, target, reduction="sum") / 50

    return kernel, formula, [rand(tokens, DIM, seed=1), rand(37, DIM, seed=2)]


CASES = {
    "attention": attention_case,
    "attention to selected entries": lambda tokens=TOKENS: attention_case(tokens, 5),
    "read": read_case,
    "write": write_case,
    "norm": norm_case,
    "norm and rotation": lambda tokens=TOKENS: norm_case(tokens, 6),
    "rotation": rotation_case,
    "swiglu": swiglu_case,
    "route": route_case,
    "sample sums": sample_case,
    "unpermute": unpermute_case,
    "cross-entropy": cross_entropy_case,
}


def results(function: Callable[..., object], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [rand(*out.shape, seed=50 + i).to(out.dtype) for i, out in enumerate(outputs)]
    sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)).backward()
    return [out.detach() for out in outputs] + [x.grad for x in leaves]


@pytest.mark.parametrize("name", CASES)
def test_errors_are_no_larger_than_those_of_plain_torch(name, monkeypatch):
    """Root mean square errors against float64.

    Twice is what another order of a sum may cost, and half a unit in the last place is no error.
    """
    kernel, formula, inputs = CASES[name]()
    exact = results(formula, [x.double() for x in inputs])
    fused = results(kernel, inputs)
    monkeypatch.setattr(host, "runs", lambda *_, **__: False)
    plain = results(kernel, inputs)
    for number, (ours, other, right) in enumerate(zip(fused, plain, exact, strict=True)):
        errors = [float((x.double() - right).square().mean().sqrt()) for x in (ours, other)]
        largest = float(right.abs().max())
        assert errors[0] <= 2 * errors[1] + 6e-8 * largest, f"{name}: result {number}: {errors}"


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_bit(name, monkeypatch):
    kernel, _, inputs = CASES[name]()
    one = results(kernel, inputs)
    monkeypatch.setattr(host, "_NUMBERS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, other in zip(results(kernel, inputs), one, strict=True):
        assert torch.equal(ours, other)


def test_loops_run_on_the_threads_that_torch_has_already(monkeypatch):
    """A second pool would compete for the cores with torch's, which spin after their work."""
    monkeypatch.setattr(host, "_NUMBERS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).exp_()
        threads = os.listdir("/proc/self/task")
        numbers = torch.zeros(4, dtype=torch.int64)
        host.over_rows(host.fused_loop(write_thread), numbers)
        assert sorted(os.listdir("/proc/self/task")) == sorted(threads)
        assert numbers.tolist() == [2, 2, 4, 4]  # each where its thread's rows end
    finally:
        torch.set_num_threads(before)


def test_a_thread_without_memory_is_an_error(monkeypatch):
    with pytest.raises(MemoryError, match="allocate"):
        host.over_rows(host.fused_loop(allocate), torch.ones(2))


POINTWISE = [name for name in CASES if not name.startswith("attention")]


@pytest.mark.parametrize("name", [name for name in POINTWISE if name != "unpermute"])
def test_no_rows(name):
    kernel, _, inputs = CASES[name](0)
    for value in results(kernel, inputs):
        assert value.isfinite().all()


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("number", [0, 1])
def test_nan_stays_nan(name, number, monkeypatch):
    """As plain torch has it: a diverging run must show."""
    kernel, _, inputs = CASES[name]()
    inputs[min(number, len(inputs) - 1)].flatten()[7] = float("nan")
    fused = results(kernel, inputs)
    monkeypatch.setattr(host, "runs", lambda *_, **__: False)
    for ours, other in zip(fused, results(kernel, inputs), strict=True):
        assert torch.equal(ours.isnan(), other.isnan())


def test_a_cpu_without_a_compiler_runs_plain_torch(monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("no back end for this CPU")

    host._builds.cache_clear()
    monkeypatch.setattr(host, "call", broken)
    try:
        with caplog.at_level(logging.WARNING):
            assert not host.runs(torch.ones(2)) and not host.runs(torch.ones(2))
            kernel, formula, inputs = read_case()
            for ours, right in zip(kernel(*inputs), formula(*inputs), strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1 and "no back end for this CPU" in lines[0]
    finally:
        host._builds.cache_clear()


def test_only_fp32_numbers_on_a_cpu():
    assert host.runs(torch.ones(2), None)
    for other in (torch.ones(2).double(), torch.ones(2).bfloat16(), torch.ones(2, device="meta")):
        assert not host.runs(torch.ones(2), other)


def test_kernels_compile_where_nothing_can_be_kept_on_disk(monkeypatch, caplog):
    """One warning: neither the source's folder nor the user's can be written."""
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    monkeypatch.setattr(host, "compilation", host.Compilation())
    with caplog.at_level(logging.WARNING):
        first, second = host.fused_loop(add_one), host.fused_loop(add_one)
        x = np.zeros(2, np.float32)
        first(0, 2, x)
        second(0, 1, x)
    assert x.tolist() == [2, 1]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "NUMBA_CACHE_DIR" in lines[0]
    assert host.compilation.count == 2 and host.compilation.seconds > 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), EOFError()])
def test_a_cache_that_fails_costs_time_alone(error, monkeypatch, caplog):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(FunctionCache, "load_overload", fails)
    monkeypatch.setattr(FunctionCache, "save_overload", fails)
    monkeypatch.setattr(host, "compilation", host.Compilation())
    x = np.zeros(2, np.float32)
    host.fused_loop(add_one)(0, 2, x)
    assert x.tolist() == [1, 1] and len(caplog.records) == 1


def add_one(start: int, stop: int, x: host.Array) -> None:
    for i in range(start, stop):
        x[i] += 1


def write_thread(start: int, stop: int, x: host.Array) -> None:
    for i in range(start, stop):
        x[i] = stop


def allocate(start: int, stop: int, x: host.Array) -> None:
    scratch = np.empty(1 << 60, np.float32)
    x[start] = scratch[stop]
