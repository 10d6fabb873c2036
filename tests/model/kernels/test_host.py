"""Fused loops for a CPU: the same numbers on any threads, and plain torch where they cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels import host
from model.kernels.hyper_connection import read_streams, write_streams
from model.kernels.hyper_connection.naive import naive_read_streams, naive_write_streams
from tests.model.kernels.compare import rand

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


CASES = {"read": read_case, "write": write_case}


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
    """Root mean square errors against float64; twice is what another order of a sum may cost."""
    kernel, formula, inputs = CASES[name]()
    exact = results(formula, [x.double() for x in inputs])
    fused = results(kernel, inputs)
    monkeypatch.setattr(host, "runs", lambda *_: False)
    plain = results(kernel, inputs)
    for number, (ours, other, right) in enumerate(zip(fused, plain, exact, strict=True)):
        errors = [float((x.double() - right).square().mean().sqrt()) for x in (ours, other)]
        largest = float(right.abs().max())
        assert errors[0] <= 2 * errors[1] + 1e-8 * largest, f"{name}: result {number}: {errors}"


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_bit(name, monkeypatch):
    kernel, _, inputs = CASES[name]()
    one = results(kernel, inputs)
    monkeypatch.setattr(host, "_NUMBERS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, other in zip(results(kernel, inputs), one, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("name", CASES)
def test_no_rows(name):
    kernel, _, inputs = CASES[name](0)
    for value in results(kernel, inputs):
        assert value.isfinite().all()


def test_a_cpu_without_a_compiler_runs_plain_torch(monkeypatch, caplog):
    def broken(x: object) -> None:
        raise RuntimeError("no back end for this CPU")

    host._builds.cache_clear()
    monkeypatch.setattr(host, "_double", broken)
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
