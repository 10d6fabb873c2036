"""Triton's kernels on a GPU in bf16, against whole masks and formulas in float64.

Skipped where there is none from Hopper on. Widths are V4's; samples have 1 to 1,000 tokens. Fresh
memory holds NaN, as in the interpreter's tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model import SampleLayout
from model.kernels.attention.naive import naive_selection_mask
from model.kernels.hyper_connection.naive import naive_write_streams
from model.kernels.indexer import IndexerInputs, KLTarget
from model.kernels.indexer.naive import naive_query_divergences, naive_scores, naive_select_topk
from model.kernels.operations import Choice
from tests.model.kernels.attention.test_attention import EPS, Case
from tests.model.kernels.compare import rand
from tests.model.kernels.compressor.test_compressor import naive as pooled
from tests.model.kernels.hyper_connection.test_hyper_connection import (
    HC_EPS,
    ITERATIONS,
    NORM_EPS,
    naive_read,
)
from tests.model.kernels.indexer.test_select import ranges_of
from tests.model.kernels.interpreter import poisoned

DEVICE, DTYPE = "cuda", torch.bfloat16
ERROR, COSINE = 2e-2, 0.999
SAMPLES = [1, 2, 129, 1000, 3, 4, 70]


pytestmark = pytest.mark.gpu(capability=(9, 0))


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned():
        yield


def draw(*shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    return rand(*shape, seed=seed).to(DEVICE, DTYPE if dtype is None else dtype)


def results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of their sums with fixed random weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    weights = [rand(*x.shape, seed=99 + i).bfloat16().to(x) for i, x in enumerate(out)]
    torch.autograd.backward(out, weights)
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [*[x.detach() for x in out], *grads]


def assert_near(
    kernel: Callable[..., Any], naive: Callable[..., Any], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The naive version gets what the kernel gets, in float64. Returns the kernel's results."""
    ours = results(kernel, inputs)
    theirs = results(naive, [x.double() for x in inputs])
    for number, (actual, other) in enumerate(zip(ours, theirs, strict=True)):
        a, b = actual.double().flatten(), other.double().flatten()
        assert a.isfinite().all(), f"result {number} is not finite"
        error = float((a - b).norm() / b.norm())
        cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
        assert error <= ERROR and cosine > COSINE, f"result {number}: {error:.1e}, {cosine:.6f}"
    return ours


def assert_same_bits(kernel: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    for a, b in zip(results(kernel, inputs), results(kernel, inputs), strict=True):
        assert torch.equal(a, b)


def case_of(ratio: int | None, heads: int, dim: int) -> Case:
    rotary = 64 if dim == 512 else 32
    return Case([SAMPLES], 128, ratio, heads, dim, rotary, DEVICE)


def attention_inputs(case: Case, seed: int = 0) -> list[Tensor]:
    shapes = [(case.tokens, case.heads, case.dim), (case.tokens, case.dim)]
    if case.ratio:
        shapes.append((case.entries, case.dim))
    out = [draw(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]
    return [*out, draw(case.heads, seed=10 * seed + 9, dtype=torch.float32)]


def attend(
    case: Case, selected: Tensor | None = None, deterministic: bool = True
) -> Callable[..., Tensor]:
    from model.kernels.attention import forward_triton

    def call(*x: Tensor) -> Tensor:
        inputs = case.arguments(*x, selected=selected)
        return forward_triton.attention(inputs, deterministic=deterministic)[0]

    return call


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("ratio", "heads", "dim"),
    [(None, 64, 512), (4, 64, 512), (128, 128, 512), (4, 16, 128), (None, 16, 128)],
)
def test_attention(ratio, heads, dim, seed):
    case = case_of(ratio, heads, dim)
    assert_near(attend(case), case.naive, attention_inputs(case, seed))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("heads", "dim", "k"), [(64, 512, 64), (128, 512, 33), (16, 128, 64)])
def test_attention_to_a_selection(heads, dim, k, deterministic):
    case = case_of(4, heads, dim)
    selected = case.select(k)
    assert (selected == -1).any()
    assert_near(
        attend(case, selected, deterministic),
        lambda *x: case.naive(*x, selected=selected),
        attention_inputs(case),
    )


@pytest.mark.parametrize("k", [None, 64])
def test_attention_twice_has_the_same_bits(k):
    case = case_of(4, 64, 512)
    selected = case.select(k) if k else None
    assert_same_bits(attend(case, selected), attention_inputs(case))


def exact_mass(case: Case, selected: Tensor | None) -> Tensor:
    """Attention to every entry summed over heads, float64 [T, C]."""
    inputs = [x.double() for x in attention_inputs(case)]
    return case.probabilities(*inputs, selected=selected)[..., case.tokens :].sum(1)


@pytest.mark.parametrize("k", [None, 64])
def test_the_entries_probability_mass(k):
    from model.kernels.attention import forward_triton, probability_mass_triton

    case = case_of(4, 64, 512)
    selected = case.select(k) if k else None
    exact = exact_mass(case, selected)
    inputs = case.arguments(*attention_inputs(case), selected=selected)
    _, lse2 = forward_triton.attention(inputs)
    mass = probability_mass_triton.entry_probability_mass(inputs, lse2).double()
    if selected is not None:
        exact = exact.gather(1, selected.clamp(min=0).long()).masked_fill(selected < 0, 0.0)
    assert float((mass - exact).norm() / exact.norm()) <= ERROR


@pytest.mark.parametrize("k", [1, 64, 512])
@pytest.mark.parametrize("heads", [8, 64])
def test_the_indexers_choice_of_whole_numbers(heads, k):
    """Sums of whole numbers are exact in any order, and many of them are equal."""
    from model.kernels.indexer import select_triton

    lengths = [1, 2, 129, 4001, 70]
    tokens, entries = sum(lengths), sum(n // 4 for n in lengths)
    q = (draw(tokens, heads, 128, seed=1).float() * 0.5).round().to(DTYPE)
    keys = (draw(entries, 128, seed=2).float() * 0.5).round().to(DTYPE)
    weights = draw(tokens, heads, seed=3, dtype=torch.float32).round()
    ranges = ranges_of(lengths, DEVICE)
    inputs = IndexerInputs(q, keys, weights)
    selected = select_triton.select_topk(inputs, ranges, k).sort(1).values
    start, end = ranges.entry_start_T[:, None], ranges.entry_end_T[:, None]
    index = torch.arange(entries, device=DEVICE)
    for rows in torch.arange(tokens, device=DEVICE).split(256):
        scores = naive_scores(q[rows].double(), keys.double(), weights[rows].double())
        sees = (index >= start[rows]) & (index < end[rows])
        assert torch.equal(selected[rows].long(), naive_select_topk(scores, sees, k).sort(1).values)


@pytest.mark.parametrize("k", [None, 64])
def test_the_indexers_loss(k):
    from model.kernels.indexer import loss_triton

    case = case_of(4, 16, 128)
    selected = case.select(k) if k else None
    sees = case.sees_entry
    if selected is not None:
        sees = sees & naive_selection_mask(selected, case.entries)
    exact = exact_mass(case, None).float()
    inputs = [draw(case.tokens, 64, 128, seed=1), draw(case.entries, 128, seed=2)]
    inputs.append(draw(case.tokens, 64, seed=3, dtype=torch.float32) * (64 * 128) ** -0.5)

    def mass(rows: slice, columns: slice) -> Tensor:
        if selected is None:
            return exact[rows, columns]
        index = selected[rows, columns]
        return exact[rows].gather(1, index.clamp(min=0).long()).masked_fill(index < 0, 0.0)

    def ours(*x: Tensor) -> Tensor:
        return loss_triton.query_divergences(
            IndexerInputs(*x), KLTarget(mass, case.ranges, selected)
        )

    assert_near(ours, lambda *x: naive_query_divergences(*x, exact.double(), sees), inputs)
    assert_same_bits(ours, inputs)


@pytest.mark.parametrize(("m", "overlap"), [(4, True), (128, False)])
def test_the_compressor(m, overlap):
    from model.kernels.compressor import pool_triton

    entries = SampleLayout.from_lengths([SAMPLES], device=DEVICE).entries(m)
    where = (entries.first_token_C, entries.has_previous_C, overlap)
    width, tokens = 512 * (2 if overlap else 1), sum(SAMPLES)
    shapes = [(tokens, width), (tokens, width), (m, width)]
    inputs = [draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]

    def ours(*x: Tensor) -> Tensor:
        return pool_triton.pool_windows(*x, *where)

    assert_near(ours, lambda *x: pooled(*x, SAMPLES, overlap), inputs)
    assert_same_bits(ours, inputs)


@pytest.mark.parametrize(("dim", "rotary"), [(4096, 0), (7168, 0), (512, 64)])
def test_norms(dim, rotary):
    from model.kernels.norm import norm_triton
    from model.kernels.norm.naive import naive_rms_norm
    from tests.model.kernels.norm.test_norm_triton import turn

    rotation = turn(999, rotary).to(DEVICE) if rotary else None
    inputs = [draw(999, dim, seed=1), draw(dim, seed=2, dtype=torch.float32)]

    def ours(*x: Tensor) -> Tensor:
        return norm_triton.rms_norm(*x, EPS, rotation, DTYPE)

    assert_near(ours, lambda *x: naive_rms_norm(*x, EPS, rotation), inputs)
    assert_same_bits(ours, inputs)


@pytest.mark.parametrize("dim", [768, 4096])
def test_hyper_connections(dim):
    from model.kernels.hyper_connection import streams_triton as kernels

    tokens, eps = 333, {"norm_eps": NORM_EPS, "hc_eps": HC_EPS}
    fp32 = [draw(*s, seed=2 + i, dtype=torch.float32) for i, s in enumerate([(24, 4 * dim), (24,)])]
    fp32[0] *= (4 * dim) ** -0.5
    reading = [draw(tokens, 4, dim, seed=1), *fp32, draw(3, seed=5, dtype=torch.float32)]
    writing = [draw(tokens, 4, dim, seed=1), draw(tokens, dim, seed=2)]
    writing += [draw(*s, seed=6, dtype=torch.float32) for s in [(tokens, 4), (tokens, 4, 4)]]

    def read(*x: Tensor) -> Any:
        return kernels.read_streams(*x, **eps, iterations=ITERATIONS)

    _, post, comb, *_ = assert_near(read, naive_read, reading)
    _, exact_post, exact_comb = naive_read(*[x.double() for x in reading])
    # The coefficients are fp32: three digits of bf16 would not do.
    for actual, other in ((post, exact_post), (comb, exact_comb)):
        assert float((actual.double() - other).abs().max()) < 1e-5
    assert_same_bits(read, reading)
    assert_near(kernels.write_streams, naive_write_streams, writing)
    assert_same_bits(kernels.write_streams, writing)


def test_experts():
    from model.kernels.permute import unpermute_triton
    from model.kernels.permute.naive import naive_unpermute_rows
    from model.kernels.swiglu import swiglu_triton
    from tests.model.kernels.permute.test_permute import random_pairs
    from tests.model.kernels.swiglu.test_swiglu import LIMIT, naive

    inputs = [draw(999, 2048, seed=i) for i in range(2)] + [draw(999, seed=3, dtype=torch.float32)]

    def ours(*x: Tensor) -> Tensor:
        return swiglu_triton.clamped_swiglu(x[0], x[1], LIMIT, x[2])

    assert_near(ours, naive, inputs)
    assert_same_bits(ours, inputs)
    _, row_of_pair = random_pairs(100, 6, 9)
    y, row_of_pair = draw(609, 4096, seed=1), row_of_pair.to(DEVICE)
    expected = naive_unpermute_rows(y.double(), row_of_pair, 100)
    out = unpermute_triton.unpermute(y, row_of_pair, 100).double()
    assert float((out - expected).norm() / expected.norm()) <= 4e-3


@pytest.mark.parametrize("vocab", [129280, 32768, 4097])
def test_cross_entropy(vocab):
    from model.kernels.cross_entropy import linear_cross_entropy
    from model.kernels.cross_entropy.naive import naive_softmax_loss
    from model.kernels.cross_entropy.softmax_triton import softmax_loss
    from tests.model.kernels.cross_entropy.test_cross_entropy import IGNORE_INDEX, naive, targets_of

    target = targets_of(777, vocab).to(DEVICE)
    logits = draw(777, vocab, seed=1) * 8
    losses, grad = softmax_loss(logits.clone(), target, 40.0, IGNORE_INDEX, True)
    leaf = logits.double().requires_grad_()
    exact = naive_softmax_loss(leaf, target, IGNORE_INDEX)
    (exact.sum() / 40.0).backward()
    assert float((losses.double() - exact).abs().max()) <= 1e-5 * float(exact.max())
    assert float((grad.double() - leaf.grad).abs().max()) <= 2**-8 * float(leaf.grad.abs().max())

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, target, 40.0, IGNORE_INDEX, Choice("triton"))

    inputs = [draw(777, 512, seed=1), draw(vocab, 512, seed=2) * 0.1]
    assert_near(ours, lambda h, w: naive(h, w, target, 40.0), inputs)
    assert_same_bits(ours, inputs)


def test_matmuls_in_fp8():
    """Codes to the bit; matmuls of the same operands, which tensor cores sum with 14 bits."""
    from model.kernels.fp8 import eager, matmul_triton
    from model.kernels.fp8.quantise_triton import quantise, quantise_weight
    from model.kernels.row_tiles_triton import tiles_of
    from tests.model.kernels.fp8.test_fp8_triton import (
        assert_same_bits,
        columns_of,
        exact,
        results,
        values,
    )

    bounds = [0, 300, 300, 1000, 1016]
    ends = torch.tensor(bounds[1:], dtype=torch.int32, device=DEVICE)
    shapes = (1024, 4096), (4, 2048, 4096), (1024, 2048)
    x, weight, grad = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
    x[:, 7] *= 2.0**20
    x[5, 300], weight[3, 5, 7] = torch.inf, torch.nan
    tiles = tiles_of(ends, len(x))
    rows, columns = quantise(x, tiles, rows=True, columns=True)
    live = bounds[-1]
    by_row = values(rows.codes, rows.scales.t())
    assert_same_bits(by_row[:live], eager.quantise_dequantise(x, 1, 128)[:live].float())
    by_tile = eager.quantise_dequantise_by_tile(x, eager.tiles_of_groups(ends, len(x)), len(ends))
    assert_same_bits(columns_of(columns, tiles, len(x))[:live], by_tile[:live].float())
    for transposed in (False, True):
        computed = values(*quantise_weight(weight, transposed=transposed))
        computed = computed.transpose(1, 2) if transposed else computed
        assert_same_bits(computed, eager.quantise_dequantise(weight, 128, 128).float())
    x[5, 300], weight[3, 5, 7] = 1.0, 1.0

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return matmul_triton.grouped(x, weight, ends)

    computed = results(ours, x, weight, grad)
    for group, (first, end) in enumerate(itertools.pairwise(bounds)):
        some = slice(first, end)
        of_group = exact(x[some], weight[group], grad[some])
        pairs = zip(
            (computed[0][some], computed[1][some], computed[2][group]), of_group, strict=True
        )
        for actual, (value, _) in pairs:
            assert float((actual.double() - value).norm()) <= 4e-3 * float(value.norm())
    for actual, other in zip(computed, results(ours, x, weight, grad), strict=True):
        assert torch.equal(actual.nan_to_num(), other.nan_to_num())
