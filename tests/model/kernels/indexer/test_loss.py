"""The indexer's objective against whole matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernels.attention import attention_with_lse2
from model.kernels.attention.naive import naive_selection_mask
from model.kernels.indexer import (
    IndexerInputs,
    KLTarget,
    MassFunction,
    attention_probability_mass,
    indexer_objective,
    kl_target,
    loss_eager,
    selected_probability_mass,
)
from model.kernels.indexer.naive import naive_query_divergences
from tests.model.kernels.attention.test_attention import Case
from tests.model.kernels.compare import assert_same, rand

HEADS, DIM = 4, 8
RTOL = 1e-5
CASES = {
    "odd length": Case([[37]], 8, 4, 3, 12),
    "one token": Case([[1]], 8, 4, 2, 8),
    "no entry anywhere": Case([[3, 1, 2]], 8, 4, 2, 8),
    "short samples": Case([[1, 2, 3, 4, 5, 17, 31]], 8, 4, 2, 8),
    "samples of 1 to 1,000 tokens": Case([[1, 2, 3, 1000, 57]], 8, 4, 2, 8),
    "several rows": Case([[15, 70, 3], [7, 50, 31]], 16, 16, 4, 8),
}


def index_inputs(case: Case, seed: int = 0, heads: int = HEADS, dim: int = DIM) -> list[Tensor]:
    """The indexer's queries, keys and head weights."""
    shapes = [(case.tokens, heads, dim), (case.entries, dim), (case.tokens, heads)]
    return [rand(*shape, seed=30 + 10 * seed + i) for i, shape in enumerate(shapes)]


def mass_of(
    case: Case, selected: Tensor | None = None, attended: Tensor | None = None
) -> MassFunction:
    """What attention gave to ``selected``, after it saw ``attended``."""
    arguments = case.arguments(*case.inputs(), selected=attended)
    _, lse2 = attention_with_lse2(arguments)
    return attention_probability_mass(replace(arguments, selected_Tk=selected), lse2)


def exact_mass(case: Case, attended: Tensor | None = None) -> Tensor:
    """[T, C] in float64, from whole matrices."""
    inputs = [x.double() for x in case.inputs()]
    return case.probabilities(*inputs, selected=attended)[..., case.tokens :].sum(1)


def naive_loss(case: Case, selected: Tensor | None = None, attended: Tensor | None = None):
    """[T] KL of everything at once in the inputs' dtype."""
    sees = case.sees_entry
    if selected is not None:
        sees = sees & naive_selection_mask(selected, case.entries)
    return lambda *x: naive_query_divergences(*x, exact_mass(case, attended), sees)


def objective(
    inputs: Sequence[Tensor],
    mass: MassFunction,
    case: Case,
    share: Tensor,
    selected: Tensor | None = None,
) -> Tensor:
    target = KLTarget(mass, case.ranges, selected)
    return indexer_objective(IndexerInputs(*inputs), target, share)


def is_divergence(
    case: Case,
    mass: MassFunction,
    expected: Callable[..., Tensor],
    selected: Tensor | None = None,
) -> None:
    """Sums with other weights for each query: their gradients are those of single losses."""
    for seed in (0, 1, 2):
        share = rand(case.tokens, seed=5 + seed).abs()
        assert_same(
            lambda *x, share=share: objective(x, mass, case, share, selected),
            lambda *x, share=share: (expected(*x) * share.double()).sum(),
            index_inputs(case, seed),
            RTOL,
        )


@pytest.fixture(params=["one block", "many blocks"])
def size(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(loss_eager, "_CPU_SCORES", HEADS * 100)


@pytest.mark.parametrize("name", CASES)
def test_dense(name, size):
    case = CASES[name]
    is_divergence(case, mass_of(case), naive_loss(case))


@pytest.mark.parametrize("name", CASES)
def test_selected(name, size):
    case = CASES[name]
    selected = case.select(5)
    is_divergence(
        case, mass_of(case, selected, selected), naive_loss(case, selected, selected), selected
    )


def test_none_may_stand_anywhere_in_a_list():
    case = CASES["short samples"]
    without_gaps = case.select(3)
    selected = torch.full((case.tokens, 9), -1, dtype=torch.int32)
    selected[:, [1, 4, 8]] = without_gaps
    is_divergence(case, mass_of(case, selected), naive_loss(case, without_gaps), selected)


@pytest.mark.parametrize("without", ["sink", "window"])
def test_the_target_s_denominator_has_sink_and_window(without):
    """The negative control: heads are weighed by the denominator, so that each part shows."""
    case = CASES["odd length"]
    share = case.probabilities(*[x.double() for x in case.inputs()])
    entries, sink = share[..., case.tokens :], 1 - share.sum(-1, keepdim=True)
    rest = share if without == "sink" else torch.cat([entries, sink], -1)
    mass = (entries / rest.sum(-1, keepdim=True)).sum(1)
    expected = lambda *x: naive_query_divergences(*x, mass, case.sees_entry)  # noqa: E731
    with pytest.raises(AssertionError, match="result 0"):
        is_divergence(case, mass_of(case), expected)


def test_the_target_gets_no_gradient():
    case = CASES["odd length"]
    attended = [x.requires_grad_() for x in case.inputs()]
    arguments = case.arguments(*attended)
    _, lse2 = attention_with_lse2(arguments)
    leaves = [x.requires_grad_() for x in index_inputs(case)]
    mass = attention_probability_mass(arguments, lse2)
    objective(leaves, mass, case, torch.ones(case.tokens)).backward()
    assert all(x.grad is None for x in attended)
    assert all(bool(x.grad.any()) for x in leaves)


@pytest.mark.parametrize("amount", [0.0, 1e-40])
def test_a_set_without_mass_has_no_loss(amount):
    case = CASES["odd length"]
    leaves = [x.requires_grad_() for x in index_inputs(case)]

    def nothing(rows: slice, columns: slice) -> Tensor:
        return torch.full((rows.stop - rows.start, columns.stop - columns.start), amount)

    loss = objective(leaves, nothing, case, torch.ones(case.tokens))
    loss.backward()
    assert not loss.any() and not any(bool(x.grad.any()) for x in leaves)


def test_an_indexer_that_scores_as_its_target_has_no_loss():
    """One head whose score is the logarithm of the mass, up to a constant."""
    case = CASES["odd length"]
    mass = rand(case.entries, seed=1).exp()
    q, weights = torch.ones(case.tokens, 1, 1), torch.ones(case.tokens, 1)
    leaves = [x.requires_grad_() for x in (q, (mass.log() + 9.0)[:, None], weights)]
    loss = objective(
        leaves,
        lambda rows, columns: mass[columns].expand(rows.stop - rows.start, -1),
        case,
        torch.ones(case.tokens),
    )
    loss.backward()
    assert float(loss.detach().abs()) < 2e-6 * case.tokens
    assert all(float(x.grad.abs().max()) < 1e-5 for x in leaves)


def test_bf16_queries_and_keys():
    case = CASES["odd length"]
    q, keys, weights = index_inputs(case)
    leaves = [x.bfloat16().requires_grad_() for x in (q, keys)]
    loss = objective([*leaves, weights], mass_of(case), case, torch.ones(case.tokens))
    loss.backward()
    assert loss.dtype == torch.float32 and leaves[0].grad.dtype == torch.bfloat16
    expected = naive_loss(case)(*[x.detach().double() for x in leaves], weights.double())
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-5, atol=1e-5)


def test_every_block_holds_its_share_of_pairs():
    """Memory does not grow with the square of the row, and the steps depend on sizes alone."""
    case = Case([[400, 1, 111]], 8, 4, 1, 4)
    target = KLTarget(mass_of(case), case.ranges)
    computed = list(target.blocks(case.entries, 1 << 10))
    assert all((r.stop - r.start) * (c.stop - c.start) <= 1 << 10 for r, c in computed)
    assert [r.stop - r.start for r, _ in computed] == [8] * 64
    blocks = list(replace(target, selected_Tk=case.select(5)).blocks(case.entries, 1 << 10))
    assert [r for r, _ in blocks] == [slice(0, 204), slice(204, 408), slice(408, 512)]


def test_how_much_probability_a_selection_gets(monkeypatch):
    monkeypatch.setattr(kl_target, "_RECALL_PAIRS", 64)
    case = CASES["short samples"]
    selected = case.select(3)
    attention, calls = mass_of(case), []

    def recorded(rows, columns):
        calls.append((rows, columns))
        return attention(rows, columns)

    of_selected, of_all = selected_probability_mass(recorded, case.ranges, selected, case.entries)
    blocks = list(KLTarget(attention, case.ranges).blocks(case.entries, 64))
    assert calls == blocks, "as every other rank does"
    assert any(columns.start == columns.stop for _, columns in calls)
    mass = exact_mass(case)
    torch.testing.assert_close(of_all.double(), mass.sum(1), rtol=0, atol=1e-5)
    expected = (mass * naive_selection_mask(selected, case.entries)).sum(1)
    torch.testing.assert_close(of_selected.double(), expected, rtol=0, atol=1e-5)
    assert 0.1 < float(of_selected.sum() / of_all.sum()) < 0.9


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_objective_is_a_weighted_sum_with_its_gradient(name, k, size):
    """Weights differ, so that a gradient of another query's size shows; some are 0 as padding's."""
    case = CASES[name]
    selected = None if k is None else case.select(k)
    share = rand(case.tokens, seed=5).relu()
    mass, calls = mass_of(case, selected, selected), []

    def counted_mass(rows: slice, columns: slice) -> Tensor:
        calls.append(rows)
        return mass(rows, columns)

    leaves = [x.requires_grad_() for x in index_inputs(case)]
    total = objective(leaves, counted_mass, case, share, selected)
    in_forward = len(calls)
    (3.0 * total).backward()
    assert len(calls) == in_forward, "the mass was evaluated again in backward"
    theirs = [x.detach().double().requires_grad_() for x in leaves]
    expected = (naive_loss(case, selected, selected)(*theirs) * share.double()).sum()
    (3.0 * expected).backward()
    assert float(total) == pytest.approx(float(expected), rel=RTOL, abs=1e-12)
    for actual, other in zip(leaves, theirs, strict=True):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        limit = RTOL * float(wanted.abs().max()) + 1e-12 if wanted.numel() else 0.0
        torch.testing.assert_close(actual.grad.double(), wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("k", [None, 3])
def test_the_gradient_by_finite_differences(k):
    case = Case([[3, 18]], 8, 4, 2, 8)
    selected = case.select(k) if k else None
    mass, share = mass_of(case, selected), rand(case.tokens, seed=5).double()
    leaves = [x.double().requires_grad_() for x in index_inputs(case)]
    assert torch.autograd.gradcheck(
        lambda *x: objective(x, mass, case, share, selected), leaves, eps=1e-6
    )
    with torch.no_grad():
        assert objective(leaves, mass, case, share, selected).grad_fn is None
