"""Triton's choice of entries, in its interpreter, against the eager version."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.kernels.indexer import IndexerInputs
from model.kernels.indexer.naive import naive_scores
from model.kernels.indexer.select_eager import eager_select_topk
from tests.model.kernels.compare import rand
from tests.model.kernels.indexer.test_select import ranges_of
from tests.model.kernels.interpreter import interpreted

HEADS, DIM = 4, 8


def inputs(lengths: list[int], seed: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and weights; whole numbers make every score exact and many of them equal."""
    tokens, entries = sum(lengths), sum(n // 4 for n in lengths)
    shapes = [(tokens, HEADS, DIM), (entries, DIM), (tokens, HEADS)]
    q, keys, weights = [rand(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]
    if whole:
        q, keys, weights = q.round(), keys.round(), weights.round()
    return q, keys, weights


def select(q: Tensor, keys: Tensor, weights: Tensor, lengths: list[int], k: int) -> Tensor:
    """In several launches of several programs."""
    from model.kernels.indexer import select_triton

    many = sum(lengths) > 1000
    size = {"rows": 128 * HEADS, "block_n": 32} if many else {"rows": 16 * HEADS, "block_n": 8}
    with patch.object(select_triton, "SELECTED_TOKENS", 512 if many else 32):
        inputs = IndexerInputs(q, keys, weights)
        return select_triton.select_topk(inputs, ranges_of(lengths), k, **size)


def as_sets(selected: Tensor) -> Tensor:
    return selected.sort(dim=1).values


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("lengths", "k"),
    [([61], 3), ([24, 37], 1), ([5, 3, 1, 40, 4, 70], 6), ([30], 50), ([3], 4)],
)
@interpreted
def test_equals_the_eager_version(lengths, k, whole, seed):
    q, keys, weights = inputs(lengths, seed, whole)
    selected = select(q, keys, weights, lengths, k)
    assert selected.dtype == torch.int32
    expected = eager_select_topk(IndexerInputs(q, keys, weights), ranges_of(lengths), k)
    assert torch.equal(as_sets(selected), as_sets(expected))


@interpreted
def test_samples_of_1_to_1000_tokens():
    lengths = [1, 2, 1000, 57]
    q, keys, weights = inputs(lengths, 0, True)
    expected = eager_select_topk(IndexerInputs(q, keys, weights), ranges_of(lengths), 16)
    assert torch.equal(as_sets(select(q, keys, weights, lengths, 16)), as_sets(expected))


@interpreted
def test_whole_numbers_do_make_ties():
    """Otherwise the test above would say nothing of them."""
    lengths, k = [90], 8
    q, keys, weights = inputs(lengths, 0, whole=True)
    scores = naive_scores(q, keys, weights)[-1]
    border = scores.sort(descending=True).values[k - 1]
    chosen = scores[select(q, keys, weights, lengths, k)[-1].long()]
    assert (scores == border).sum() > (chosen == border).sum()


@interpreted
def test_the_best_come_first():
    lengths, k = [90], 8
    q, keys, weights = inputs(lengths, 0, whole=False)
    scores = naive_scores(q, keys, weights)
    best = select(q, keys, weights, lengths, k)[-1].long()
    assert torch.equal(best, scores[-1].topk(k).indices)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@interpreted
def test_zeros_of_either_sign_are_equal(sign):
    lengths, k = [50], 5
    q, keys, weights = inputs(lengths, 0, whole=False)
    selected = select(q.abs(), -keys.abs(), sign * weights.abs(), lengths, k)
    assert as_sets(selected)[-1].tolist() == [0, 1, 2, 3, 4]


@interpreted
def test_16_bits():
    """fp16, because the interpreter multiplies bf16 numbers as if they were integers."""
    q, keys, weights = inputs([61], 0, whole=False)
    q, keys = q.half(), keys.half()
    rounded = select(q.float(), keys.float(), weights, [61], 4)
    assert torch.equal(select(q, keys, weights, [61], 4), rounded)


@interpreted
def test_odd_head_counts_are_refused():
    from model.kernels.indexer import select_triton

    q, keys, weights = rand(8, 3, DIM), rand(2, DIM), rand(8, 3)
    with pytest.raises(ValueError, match="3 index heads"):
        select_triton.select_topk(IndexerInputs(q, keys, weights), ranges_of([8]), 2)
