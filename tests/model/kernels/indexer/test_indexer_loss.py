"""The indexer's objective against whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.attention.attention import attention_with_lse
from model.kernels.indexer import loss as module
from model.kernels.indexer.loss import (
    Mass,
    attention_mass,
    blocks,
    indexer_loss,
    indexer_objective,
    kept_mass,
    reference_indexer_loss,
)
from tests.model.kernels.attention.test_attention import EPS, Case
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


def teacher(case: Case, selected: Tensor | None = None, attended: Tensor | None = None) -> Mass:
    """What attention gave to ``selected``, after it saw ``attended``."""
    q, kv, entries, sink = case.inputs()
    shared = (case.rotation, case.ranges)
    _, lse = attention_with_lse(
        q, kv, entries, sink, *shared, attended, window=case.window, norm_eps=EPS
    )
    return attention_mass(q, entries, lse, *shared, selected, norm_eps=EPS)


def whole(case: Case, selected: Tensor | None = None, attended: Tensor | None = None):
    """[T] KL of everything at once in the inputs' dtype; the teacher from first principles."""
    inputs = [x.double() for x in case.inputs()]
    mass = case.probabilities(*inputs, selected=attended)[..., case.tokens :].sum(1)
    seen = case.sees_entry if selected is None else case.sees_entry & case.picked(selected)
    return lambda q, keys, weights: divergence(q, keys, weights, mass * seen, seen)


def divergence(q: Tensor, keys: Tensor, weights: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
    scores = torch.einsum("tij,cj->tic", q, keys).relu()
    scores = torch.einsum("tic,ti->tc", scores, weights)
    taught = mass.sum(1) > 0
    target = mass[taught] / mass[taught].sum(1, keepdim=True)
    log_share = scores.masked_fill(~seen, -torch.inf)[taught].log_softmax(1)
    log_share = log_share.masked_fill(~seen[taught], 0.0)
    kl = (torch.xlogy(target, target) - target * log_share).sum(1)
    return torch.zeros(len(q), dtype=q.dtype, device=q.device).masked_scatter(taught, kl)


def is_divergence(case: Case, mass: Mass, expected, selected: Tensor | None = None) -> None:
    for seed in (0, 1, 2):
        assert_same(
            lambda *x: indexer_loss(*x, mass, case.ranges, selected),
            expected,
            index_inputs(case, seed),
            RTOL,
        )


@pytest.fixture(params=["one block", "many blocks"])
def size(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(module, "_CPU_SCORES", HEADS * 100)


@pytest.mark.parametrize("name", CASES)
def test_dense(name, size):
    case = CASES[name]
    is_divergence(case, teacher(case), whole(case))


@pytest.mark.parametrize("name", CASES)
def test_selected(name, size):
    case = CASES[name]
    selected = case.select(5)
    is_divergence(
        case, teacher(case, selected, selected), whole(case, selected, selected), selected
    )


def test_none_may_stand_anywhere_in_a_list():
    case = CASES["short samples"]
    listed = case.select(3)
    selected = torch.full((case.tokens, 9), -1, dtype=torch.int32)
    selected[:, [1, 4, 8]] = listed
    is_divergence(case, teacher(case, selected), whole(case, listed), selected)


@pytest.mark.parametrize("without", ["sink", "window"])
def test_the_teacher_s_denominator_has_sink_and_window(without):
    """The negative control: heads are weighed by the denominator, so that each part shows."""
    case = CASES["odd length"]
    share = case.probabilities(*[x.double() for x in case.inputs()])
    entries, sink = share[..., case.tokens :], 1 - share.sum(-1, keepdim=True)
    rest = share if without == "sink" else torch.cat([entries, sink], -1)
    mass = (entries / rest.sum(-1, keepdim=True)).sum(1)
    expected = lambda *x: divergence(*x, mass * case.sees_entry, case.sees_entry)  # noqa: E731
    with pytest.raises(AssertionError, match="result 0"):
        is_divergence(case, teacher(case), expected)


@pytest.mark.parametrize("k", [None, 3])
def test_finite_differences(k):
    case = Case([[3, 18]], 8, 4, 2, 8)
    selected = case.select(k) if k else None
    mass = teacher(case, selected)
    leaves = [x.double().requires_grad_() for x in index_inputs(case)]
    assert torch.autograd.gradcheck(
        lambda *x: reference_indexer_loss(*x, mass, case.ranges, selected), leaves, eps=1e-6
    )


def test_the_teacher_gets_no_gradient():
    case = CASES["odd length"]
    q, kv, entries, sink = [x.requires_grad_() for x in case.inputs()]
    shared = (case.rotation, case.ranges)
    _, lse = attention_with_lse(q, kv, entries, sink, *shared, window=case.window, norm_eps=EPS)
    leaves = [x.requires_grad_() for x in index_inputs(case)]
    mass = attention_mass(q, entries, lse, *shared, norm_eps=EPS)
    indexer_loss(*leaves, mass, case.ranges).sum().backward()
    assert all(x.grad is None for x in (q, kv, entries, sink))
    assert all(bool(x.grad.any()) for x in leaves)


@pytest.mark.parametrize("amount", [0.0, 1e-40])
def test_a_set_without_mass_teaches_nothing(amount):
    case = CASES["odd length"]
    leaves = [x.requires_grad_() for x in index_inputs(case)]

    def nothing(rows: slice, columns: slice) -> Tensor:
        return torch.full((rows.stop - rows.start, columns.stop - columns.start), amount)

    loss = indexer_loss(*leaves, nothing, case.ranges)
    loss.sum().backward()
    assert not loss.any() and not any(bool(x.grad.any()) for x in leaves)


def test_an_indexer_that_scores_as_the_teacher_has_no_loss():
    """One head whose score is the logarithm of the mass, up to a constant."""
    case = CASES["odd length"]
    mass = rand(case.entries, seed=1).exp()
    q, weights = torch.ones(case.tokens, 1, 1), torch.ones(case.tokens, 1)
    leaves = [x.requires_grad_() for x in (q, (mass.log() + 9.0)[:, None], weights)]
    loss = indexer_loss(
        *leaves,
        lambda rows, columns: mass[columns].expand(rows.stop - rows.start, -1),
        case.ranges,
    )
    loss.sum().backward()
    assert float(loss.detach().abs().max()) < 2e-6
    assert all(float(x.grad.abs().max()) < 1e-5 for x in leaves)


def test_bf16_queries_and_keys():
    case = CASES["odd length"]
    q, keys, weights = index_inputs(case)
    leaves = [x.bfloat16().requires_grad_() for x in (q, keys)]
    loss = indexer_loss(*leaves, weights, teacher(case), case.ranges)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and leaves[0].grad.dtype == torch.bfloat16
    expected = whole(case)(*[x.detach().double() for x in leaves], weights.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_block_holds_its_share_of_pairs():
    """Memory does not grow with the square of the row, and the steps depend on sizes alone."""
    case = Case([[400, 1, 111]], 8, 4, 1, 4)
    found = list(blocks(case.ranges, case.entries, None, 1 << 10))
    assert all((r.stop - r.start) * (c.stop - c.start) <= 1 << 10 for r, c in found)
    assert [r.stop - r.start for r, _ in found] == [8] * 64
    listed = list(blocks(case.ranges, case.entries, 5, 1 << 10))
    assert [r for r, _ in listed] == [slice(0, 204), slice(204, 408), slice(408, 512)]


def test_how_much_a_selection_keeps(monkeypatch):
    monkeypatch.setattr(module, "_KEPT_PAIRS", 64)
    case = CASES["short samples"]
    selected = case.select(3)
    attention, asked = teacher(case), []

    def noted(rows, columns):
        asked.append((rows, columns))
        return attention(rows, columns)

    kept, every = kept_mass(noted, case.ranges, selected, case.entries)
    assert asked == list(blocks(case.ranges, case.entries, None, 64)), "as every other rank does"
    assert any(columns.start == columns.stop for _, columns in asked)
    mass = case.probabilities(*[x.double() for x in case.inputs()])[..., case.tokens :].sum(1)
    torch.testing.assert_close(every.double(), mass.sum(1), rtol=0, atol=1e-5)
    expected = (mass * case.picked(selected)).sum(1)
    torch.testing.assert_close(kept.double(), expected, rtol=0, atol=1e-5)
    assert 0.1 < float(kept.sum() / every.sum()) < 0.9


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_objective_is_a_weighted_sum_with_its_gradient(name, k, size):
    """Weights differ, so that a gradient of another query's size shows; some are 0 as padding's."""
    case = CASES[name]
    selected = None if k is None else case.select(k)
    share = rand(case.tokens, seed=5).relu()
    mass, calls = teacher(case, selected, selected), []

    def asked(rows: slice, columns: slice) -> Tensor:
        calls.append(rows)
        return mass(rows, columns)

    leaves = [x.requires_grad_() for x in index_inputs(case)]
    total = indexer_objective(*leaves, asked, case.ranges, share, selected)
    in_forward = len(calls)
    (3.0 * total).backward()
    assert len(calls) == in_forward, "the teacher was asked again in backward"
    theirs = [x.detach().double().requires_grad_() for x in leaves]
    expected = (whole(case, selected, selected)(*theirs) * share.double()).sum()
    (3.0 * expected).backward()
    assert float(total) == pytest.approx(float(expected), rel=RTOL, abs=1e-12)
    for mine, other in zip(leaves, theirs, strict=True):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        limit = RTOL * float(wanted.abs().max()) + 1e-12 if wanted.numel() else 0.0
        torch.testing.assert_close(mine.grad.double(), wanted, rtol=0, atol=limit)


def test_the_objective_s_gradient_by_finite_differences():
    case = Case([[3, 18]], 8, 4, 2, 8)
    mass, share = teacher(case), rand(case.tokens, seed=5).double()
    leaves = [x.double().requires_grad_() for x in index_inputs(case)]
    assert torch.autograd.gradcheck(
        lambda *x: indexer_objective(*x, mass, case.ranges, share), leaves, eps=1e-6
    )
    with torch.no_grad():
        assert indexer_objective(*leaves, mass, case.ranges, share).grad_fn is None
