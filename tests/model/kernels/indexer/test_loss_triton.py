"""Triton's indexer loss, in its interpreter, against whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.indexer import IndexerInputs, KLTarget, MassFunction
from model.kernels.indexer.naive import naive_query_divergences
from tests.model.kernels.attention.test_attention import Case
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.indexer.test_loss import (
    DIM,
    HEADS,
    index_inputs,
    mass_of,
    naive_loss,
)
from tests.model.kernels.interpreter import interpreted, last_program_first

RTOL = 1e-5
CASES = {
    "odd length": Case([[37]], 8, 4, 3, 12),
    "one token": Case([[1]], 8, 4, 2, 8),
    "no entry anywhere": Case([[3, 1, 2]], 8, 4, 2, 8),
    "short samples": Case([[1, 2, 3, 4, 5, 17, 31]], 8, 4, 2, 8),
    "several rows": Case([[15, 9, 3], [7, 20]], 16, 4, 4, 8),
    "begins at the last key of a program": Case([[12, 17]], 8, 4, 2, 8),
    "samples of 1 to 1,000 tokens": Case([[1, 2, 3, 1000, 57]], 8, 4, 2, 8),
}


def loss(
    inputs: tuple[Tensor, ...],
    mass: MassFunction,
    case: Case,
    selected: Tensor | None,
    blocks: int = 1,
) -> Tensor:
    from model.kernels.indexer import loss_triton

    pairs = case.tokens * max(case.entries if selected is None else selected.shape[1], 1)
    most = -(-pairs // blocks)
    return loss_triton.query_divergences(
        IndexerInputs(*inputs),
        KLTarget(mass, case.ranges, selected),
        rows=(128 if case.tokens > 999 else 4) * HEADS,
        block_n=64 if case.tokens > 999 else 4,
        range_pairs=most,
        pair_bytes=most * 4 * DIM,
    )


def is_divergence(
    case: Case,
    mass: MassFunction,
    expected,
    selected: Tensor | None,
    seed: int,
    blocks: int,
) -> None:
    inputs = index_inputs(case, seed)
    assert_same(lambda *x: loss(x, mass, case, selected, blocks), expected, inputs, RTOL)


@pytest.mark.parametrize(("seed", "blocks"), [(0, 1), (1, 3), (2, 7)])
@pytest.mark.parametrize("name", CASES)
@interpreted
def test_dense(name, blocks, seed):
    case = CASES[name]
    is_divergence(case, mass_of(case), naive_loss(case), None, seed, blocks)


# With lists a program has one token, too many of them for the interpreter in the longest case.
@pytest.mark.parametrize(("seed", "blocks"), [(0, 1), (1, 3), (2, 7)])
@pytest.mark.parametrize("name", list(CASES)[:-1])
@interpreted
def test_selected(name, blocks, seed):
    case = CASES[name]
    selected = case.select(5)
    mass, expected = mass_of(case, selected, selected), naive_loss(case, selected, selected)
    is_divergence(case, mass, expected, selected, seed, blocks)


@interpreted
def test_none_may_stand_anywhere_in_a_list():
    case = CASES["short samples"]
    without_gaps = case.select(3)
    selected = torch.full((case.tokens, 9), -1, dtype=torch.int32)
    selected[:, [1, 4, 8]] = without_gaps
    is_divergence(case, mass_of(case, selected), naive_loss(case, without_gaps), selected, 0, 3)


@pytest.mark.parametrize("k", [None, 5])
@interpreted
def test_two_runs_agree_bit_for_bit_in_any_order_of_programs(k):
    case = CASES["several rows"]
    selected = case.select(k) if k else None
    mass = mass_of(case, selected)

    def run() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in index_inputs(case)]
        out = loss(tuple(leaves), mass, case, selected, 2)
        (out * rand(case.tokens, seed=5)).sum().backward()
        return [out.detach(), *[x.grad for x in leaves]]

    first = run()
    with last_program_first():
        second = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("amount", [0.0, 1e-40])
@pytest.mark.parametrize("k", [None, 5])
@interpreted
def test_a_set_without_mass_has_no_loss(k, amount):
    case = CASES["odd length"]
    leaves = tuple(x.requires_grad_() for x in index_inputs(case))

    def nothing(rows: slice, columns: slice) -> Tensor:
        return torch.full((rows.stop - rows.start, columns.stop - columns.start), amount)

    out = loss(leaves, nothing, case, case.select(k) if k else None)
    out.sum().backward()
    assert not out.any() and not any(bool(x.grad.any()) for x in leaves)


@interpreted
def test_the_mass_is_left_as_it_was():
    """It may be a view of a tensor in use elsewhere, here one row for all queries."""
    case = CASES["odd length"]
    shared = rand(case.entries, seed=1).exp()
    before = shared.clone()

    def mass(rows: slice, columns: slice) -> Tensor:
        return shared[columns].expand(rows.stop - rows.start, -1)

    all_rows = shared.double().expand(case.tokens, -1)
    expected = lambda *x: naive_query_divergences(*x, all_rows, case.sees_entry)  # noqa: E731
    is_divergence(case, mass, expected, None, 0, 2)
    assert torch.equal(shared, before)


@interpreted
def test_16_bits():
    """fp16, because the interpreter multiplies bf16 numbers as if they were integers."""
    case = CASES["odd length"]
    q, keys, weights = index_inputs(case)
    leaves = [q.half().requires_grad_(), keys.half().requires_grad_(), weights.requires_grad_()]
    out = loss(tuple(leaves), mass_of(case), case, None)
    out.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = naive_loss(case)(*exact)
    expected.sum().backward()
    assert out.dtype == torch.float32 and leaves[0].grad.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for actual, other in zip(leaves, exact, strict=True):
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(actual.grad.double(), other.grad, rtol=0, atol=2e-3 * largest)


@interpreted
def test_odd_head_counts_are_refused():
    from model.kernels.indexer import loss_triton

    case = CASES["odd length"]
    with pytest.raises(ValueError, match="3 index heads"):
        inputs = IndexerInputs(*index_inputs(case, heads=3))
        loss_triton.query_divergences(inputs, KLTarget(mass_of(case), case.ranges))


@pytest.mark.parametrize("needs_grad", [False, True])
@interpreted
def test_the_objective_is_the_eager_version_s(needs_grad):
    from model.kernels.indexer.loss_eager import eager_objective
    from model.kernels.indexer.loss_triton import objective

    case = CASES["odd length"]
    inputs, share = IndexerInputs(*index_inputs(case)), rand(case.tokens, seed=5)
    target = KLTarget(mass_of(case), case.ranges)
    total, gradients = objective(inputs, target, share, needs_grad)
    other, others = eager_objective(inputs, target, share, needs_grad)
    assert len(gradients) == len(others) == (3 if needs_grad else 0)
    torch.testing.assert_close(total, other, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
