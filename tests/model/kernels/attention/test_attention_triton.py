"""Triton's core attention, in its interpreter, against whole masks in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from model.kernels.attention import AttentionInputs, AttentionRanges
from model.kernels.attention.eager import eager_attention, eager_entry_probability_mass
from tests.model.kernels.attention.test_attention import EPS, Case
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.interpreter import interpreted, last_program_first

if TYPE_CHECKING:
    from model.kernels.attention.parts_triton import Blocks

RTOL = 1e-5
SEEDS = (0, 1, 2)

CASES = {
    "window only, odd length": Case([[37]], 8, None, 3, 16),
    "more heads than rows": Case([[29]], 7, 4, 6, 8),
    "one token": Case([[1]], 8, 4, 2, 8),
    "no complete window anywhere": Case([[3, 1, 2]], 8, 4, 2, 8),
    "samples of 1 to 200 tokens": Case([[1, 2, 3, 5, 200]], 40, 4, 2, 8),
    "long samples between ones without entries": Case([[15, 70, 3], [7, 50, 31]], 16, 16, 4, 8),
    "short samples": Case([[1, 2, 3, 4, 5, 17, 31]], 8, 4, 2, 8),
    "samples of 1 to 1000 tokens": Case([[1, 2, 1000, 3, 57]], 40, 4, 2, 8),
}
SHORT = ["more heads than rows", "short samples"]


def blocks(case: Case) -> Blocks:
    """So small that every loop runs more than once, and no smaller: each step takes its time."""
    from model.kernels.attention.parts_triton import Blocks

    if case.tokens > 1000:
        return Blocks(128, 128, 128, 128, 128, 128, programs=4, pair_bytes=1 << 16)
    if case.tokens > 100:
        return Blocks(32, 32, 32, 16, 32, 16, programs=30, pair_bytes=1 << 14)
    key_rows = 4 if case.heads > 4 else 8
    return Blocks(4, 8, 4, 8, key_rows, 8, programs=10, pair_bytes=1 << 12)


def inputs(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, kv, entries (where there are any), sink."""
    shapes = [(case.tokens, case.heads, case.dim), (case.tokens, case.dim)]
    if case.ratio:
        shapes.append((case.entries, case.dim))
    out = [rand(*shape, seed=10 * seed + i).to(dtype) for i, shape in enumerate(shapes)]
    return [*out, rand(case.heads, seed=10 * seed + 9)]


def run(
    case: Case, *leaves: Tensor, selected: Tensor | None = None, deterministic: bool = True
) -> Tensor:
    from model.kernels.attention import forward_triton

    return forward_triton.attention(
        case.arguments(*leaves, selected=selected), deterministic=deterministic, blocks=blocks(case)
    )[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
@interpreted
def test_equals_whole_masks(name, seed):
    case = CASES[name]
    assert_same(lambda *x: run(case, *x), case.naive, inputs(case, seed), RTOL)


@pytest.mark.parametrize(
    ("name", "deterministic", "seed"),
    [(name, True, seed) for name in SHORT for seed in SEEDS] + [(SHORT[0], False, 0)],
)
@interpreted
def test_selection_equals_whole_masks(name, deterministic, seed):
    case = CASES[name]
    selected = case.select(5)
    assert (selected == -1).any() and (selected >= 0).any()
    assert_same(
        lambda *x: run(case, *x, selected=selected, deterministic=deterministic),
        lambda *x: case.naive(*x, selected=selected),
        inputs(case, seed),
        RTOL,
    )


@interpreted
def test_what_is_computed_once_for_all_layers_has_names(monkeypatch):
    """An address would be that of another tensor as soon as its own is freed."""
    case, keys = Case([[2, 75]], 8, 4, 2, 8), []
    derived = AttentionRanges.derived

    def record(ranges, key, make):
        keys.append(key)
        return derived(ranges, key, make)

    monkeypatch.setattr(AttentionRanges, "derived", record)
    leaves = [x.requires_grad_() for x in inputs(case, 0)]
    run(case, *leaves, selected=case.select(12)).sum().backward()
    queries = [key for key in keys if key[0] == "queries of blocks"]
    assert len(set(queries)) == 2
    assert all(part < 4096 for key in queries for part in key if isinstance(part, int))


@interpreted
def test_selection_in_a_longer_sample():
    case = Case([[2, 75]], 8, 4, 2, 8)
    selected = case.select(12)
    assert_same(
        lambda *x: run(case, *x, selected=selected),
        lambda *x: case.naive(*x, selected=selected),
        inputs(case, 0),
        RTOL,
    )


@interpreted
def test_lists_longer_than_what_is_selected():
    """Lists of 41 columns of which the last 36 or more are empty, in blocks of 8."""
    case = CASES["more heads than rows"]
    selected = case.select(41)
    assert (selected[:, 7:] == -1).all()
    assert_same(
        lambda *x: run(case, *x, selected=selected),
        lambda *x: case.naive(*x, selected=selected),
        inputs(case, 0),
        RTOL,
    )


def _divided() -> tuple[Case, list[int], list[int], AttentionRanges]:
    """Queries 10 to 19 and 45 to 60 of one sample, and the keys that their windows reach."""
    case = Case([[61]], 7, 4, 2, 8)
    queries = [*range(10, 20), *range(45, 61)]
    keys = [*range(4, 20), *range(39, 61)]
    place = {key: i for i, key in enumerate(keys)}
    rows = torch.tensor(queries)
    start = torch.tensor([place[t - 6] for t in queries])
    # Query 0 is key 6, and query 10 is key 22.
    whole = case.ranges
    return (
        case,
        queries,
        keys,
        AttentionRanges(
            start,
            ((0, 10, 6), (10, 26, 12)),
            whole.entry_start_T[rows],
            whole.entry_end_T[rows],
            whole.host_entry_start_T[rows.numpy()],
            whole.host_entry_end_T[rows.numpy()],
        ),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [None, 5])
@interpreted
def test_more_keys_than_queries(k, seed):
    """A rank's queries in two segments, with the keys before each: as in the whole sample."""
    from model.kernels.attention import forward_triton

    case, queries, keys, ranges = _divided()
    selected = case.select(k) if k else None
    q, kv, entries, sink = inputs(case, seed)

    def ours(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor) -> Tensor:
        inputs = AttentionInputs(
            q,
            kv,
            entries,
            sink,
            case.rotation[queries],
            ranges,
            None if selected is None else selected[queries],
            window=case.window,
            norm_eps=EPS,
        )
        return forward_triton.attention(inputs, blocks=blocks(case))[0]

    def naive(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor) -> Tensor:
        whole_q, whole_kv = q.new_ones(61, *q.shape[1:]), kv.new_zeros(61, kv.shape[1])
        whole_q = whole_q.index_put((torch.tensor(queries),), q)
        whole_kv = whole_kv.index_put((torch.tensor(keys),), kv)
        return case.naive(whole_q, whole_kv, entries, sink, selected=selected)[queries]

    assert_same(ours, naive, [q[queries], kv[keys], entries, sink], RTOL)


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("name", SHORT)
@interpreted
def test_lse2_and_probability_mass_equal_the_eager_version(name, k):
    from model.kernels.attention import forward_triton, probability_mass_triton

    case = CASES[name]
    selected = case.select(k) if k else None
    arguments = case.arguments(*inputs(case, 3), selected=selected)
    _, expected = eager_attention(arguments)
    _, lse2 = forward_triton.attention(arguments, blocks=blocks(case))
    torch.testing.assert_close(lse2, expected, rtol=0, atol=1e-5)
    for start, stop in [(0, None)] if k else [(0, None), (2, case.entries - 1)]:
        mass = probability_mass_triton.entry_probability_mass(
            arguments, lse2, blocks=blocks(case), start=start, stop=stop
        )
        other = eager_entry_probability_mass(arguments, expected, start=start, stop=stop)
        assert float(other.max()) > 0.1
        torch.testing.assert_close(mass, other, rtol=0, atol=1e-5)


@interpreted
def test_16_bits():
    """fp16, because the interpreter multiplies bf16 numbers as if they were integers."""
    case = CASES["more heads than rows"]
    leaves = inputs(case, 0, torch.float16)
    assert run(case, *leaves).dtype == torch.float16
    assert_same(lambda *x: run(case, *x), case.naive, leaves, rtol=2e-3)


ORDERED = Case([[3, 31]], 8, 4, 2, 8)


def _gradients(case: Case, selected: Tensor | None, deterministic: bool) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in inputs(case, 0)]
    out = run(case, *leaves, selected=selected, deterministic=deterministic)
    (out * rand(*out.shape, seed=7)).sum().backward()
    return [out.detach(), *[leaf.grad for leaf in leaves]]


@pytest.mark.parametrize("k", [None, 5])
@interpreted
def test_the_order_of_programs_changes_no_bit(k):
    case = ORDERED
    selected = case.select(k) if k else None
    forward = _gradients(case, selected, deterministic=True)
    with last_program_first():
        backward = _gradients(case, selected, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@interpreted
def test_the_order_of_programs_shows_where_atomics_add():
    """The negative control of the test above."""
    case = ORDERED
    forward = _gradients(case, case.select(5), deterministic=False)
    with last_program_first():
        backward = _gradients(case, case.select(5), deterministic=False)
    assert torch.equal(forward[1], backward[1])
    assert not torch.equal(forward[3], backward[3])


@interpreted
def test_ordered_block_sizes_sum_as_deterministic_calls_do():
    from model.kernels.attention import forward_triton

    case = ORDERED
    leaves = [x.requires_grad_() for x in inputs(case, 0)]
    out, _ = forward_triton.attention(
        case.arguments(*leaves, selected=case.select(5)),
        deterministic=False,
        blocks=replace(blocks(case), ordered=1),
    )
    (out * rand(*out.shape, seed=7)).sum().backward()
    expected = _gradients(case, case.select(5), deterministic=True)
    assert torch.equal(leaves[2].grad, expected[3])


@interpreted
def test_pairs_of_16_bits_are_summed_in_fp32():
    from model.kernels.attention.pairs_triton import add_pairs

    pairs, grad = rand(40, 8, seed=0).to(torch.bfloat16), rand(6, 8, seed=1)
    entry = torch.arange(40, dtype=torch.int32) % 7 - 1
    expected = grad.clone().index_add_(0, entry[entry >= 0], pairs[entry >= 0].float())
    add_pairs(pairs, entry, grad)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", ["sink", "window", "entry", "rotation"])
@interpreted
def test_a_small_fault_is_detected(fault):
    """The negative control of everything above: each term matters at this tolerance."""
    case = Case([[61]], 7, 4, 2, 8)
    if fault == "window":
        case.sees_token[40, 33] = True
    elif fault == "entry":
        case.sees_entry[40, 10] = True
    elif fault == "rotation":
        case.position[40] += 0.01
    moved = 1e-3 if fault == "sink" else 0.0
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(
            lambda *x: run(case, *x),
            lambda *x: case.naive(*x[:-1], x[-1] + moved),
            inputs(case, 0),
            RTOL,
        )


@interpreted
def test_more_rows_than_32_bits_number_are_refused():
    from model.kernels.backend import UnsupportedError

    case = CASES["one token"]
    q, *rest = inputs(case, 0)
    with pytest.raises(UnsupportedError, match="16777216 tokens of 64 heads"):
        run(case, q[:, :1].expand(1 << 24, 64, case.dim), *rest)


@interpreted
def test_a_width_without_sizes_is_refused():
    from model.kernels.attention.parts_triton import blocks_for

    with pytest.raises(ValueError, match="head_dim is 48"):
        blocks_for(48)
