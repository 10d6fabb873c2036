"""Selection of compressed entries against a sort in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.kernels import host
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import IndexerInputs, select_eager, select_topk
from model.kernels.indexer.naive import naive_scores
from model.kernels.indexer.select_eager import entry_scores
from model.layout import SampleLayout
from model.positions import Positions
from tests.model.kernels.compare import rand
from tests.model.tiny import tiny_config


def ranges_of(lengths: list[int], device: str = "cpu") -> AttentionRanges:
    """Ranges at four tokens an entry."""
    layout = SampleLayout.from_lengths([lengths], device=device)
    return Positions.of_microbatch(tiny_config(), layout).ranges("csa")


def visible_entries(lengths: list[int]) -> list[range]:
    first, out = 0, []
    for n in lengths:
        out += [range(first, first + (t + 1) // 4) for t in range(n)]
        first += n // 4
    return out


def select(
    q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, lengths: list[int], k: int
) -> torch.Tensor:
    return select_topk(IndexerInputs(q, keys, weights), ranges_of(lengths), k)


def inputs(lengths: list[int], heads: int, dim: int) -> list[torch.Tensor]:
    tokens, entries = sum(lengths), sum(n // 4 for n in lengths)
    return [
        rand(tokens, heads, dim, seed=1),
        rand(entries, dim, seed=2),
        rand(tokens, heads, seed=3),
    ]


@pytest.mark.parametrize("k", [1, 5, 16])
def test_fused_loops_select_as_plain_torch_does(k, monkeypatch):
    """To the index and in the same order, with many equal scores: all are small integers."""
    lengths = [90, 3, 40]
    q, keys, weights = (x.sign() for x in inputs(lengths, 3, 4))
    fused = select(q, keys, weights, lengths, k)
    monkeypatch.setattr(host, "runs", lambda *_, **__: False)
    assert torch.equal(fused, select(q, keys, weights, lengths, k))


def test_scores_by_hand():
    q, keys, weights = inputs([24], 3, 8)
    expected = torch.zeros(24, 6, dtype=torch.float64)
    for t in range(24):
        for s in range(6):
            for h in range(3):
                dot = max(0.0, float(q[t, h].double() @ keys[s].double()))
                expected[t, s] += float(weights[t, h]) * dot
    torch.testing.assert_close(
        naive_scores(*[x.double() for x in (q, keys, weights)]), expected, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(entry_scores(q, keys, weights).double(), expected, rtol=0, atol=1e-5)


# The last one has so many scores that they do not all fit into one block.
@pytest.mark.parametrize(
    ("lengths", "heads", "k"),
    [
        ([61], 3, 5),
        ([61], 3, 1),
        ([5, 3, 1, 40, 4, 87], 4, 6),
        ([30], 2, 50),
        ([3], 2, 4),
        ([1700, 700], 4, 60),
    ],
)
def test_the_best_visible_entries_are_selected(lengths, heads, k):
    q, keys, weights = inputs(lengths, heads, 8)
    selected = select(q, keys, weights, lengths, k)
    assert selected.shape == (sum(lengths), k) and selected.dtype == torch.int32
    scores = naive_scores(*[x.double() for x in (q, keys, weights)])
    for t, visible in enumerate(visible_entries(lengths)):
        row = selected[t]
        chosen = row[row >= 0].tolist()
        assert len(chosen) == len(set(chosen)) == min(k, len(visible))
        assert (row[row < 0] == -1).all()
        assert set(chosen) <= set(visible)
        rest = [s for s in visible if s not in set(chosen)]
        if rest:
            # Sums in another order may swap scores that are equal in fp32.
            assert scores[t, chosen].min() >= scores[t, rest].max() - 1e-5


def test_first_entry_of_a_later_sample_is_not_entry_zero():
    lengths = [40, 40]
    q, keys, weights = inputs(lengths, 2, 8)
    selected = select(q, keys, weights, lengths, 3)
    assert selected[40:43].tolist() == [[-1, -1, -1]] * 3
    assert selected[43].tolist() == [10, -1, -1]
    assert int(selected[40:].clamp(min=10).min()) == 10 and 10 in selected[52:].flatten()
    assert 0 in selected[12:40].flatten()


@pytest.mark.parametrize("heads_sign", [1.0, -1.0])
def test_ties_go_to_the_lower_entry(heads_sign):
    """ReLU makes scores of exactly 0 and -0 common; equal ones go in the order of entries."""
    lengths, k = [7, 80], 5
    q, keys, weights = inputs(lengths, 2, 8)
    q, keys = q.abs(), -keys.abs()
    keys[1 + 12] = 1.0
    weights = heads_sign * weights.abs()
    selected = select(q, keys, weights, lengths, k)
    for t in range(7 + 24, 87):
        ahead = [13] if heads_sign > 0 and t >= 7 + 51 else []
        # Entry 13 has the largest score or the only negative one; all the others tie at zero.
        assert sorted(selected[t].tolist()) == sorted([*range(1, 1 + k - len(ahead)), *ahead]), t


def test_negative_scores_are_ordered_too():
    lengths = [40]
    q, keys, weights = inputs(lengths, 1, 4)
    q, weights = torch.ones_like(q), -torch.ones_like(weights)
    keys = torch.arange(10.0, 0, -1)[:, None].expand(10, 4)
    selected = select(q, keys, weights, lengths, 3)
    assert sorted(selected[39].tolist()) == [7, 8, 9]


def test_a_sample_s_selection_does_not_depend_on_what_is_packed_with_it():
    q, keys, weights = inputs([61], 3, 8)
    alone = select(q, keys, weights, [61], 4)
    before_q, before_keys, before_weights = inputs([90], 3, 8)
    packed = select(
        torch.cat([before_q, q]),
        torch.cat([before_keys, keys]),
        torch.cat([before_weights, weights]),
        [90, 61],
        4,
    )
    moved = torch.where(alone >= 0, alone + 22, alone)
    assert torch.equal(packed[90:], moved)


def test_bf16_queries_and_keys():
    q, keys, weights = inputs([61], 3, 8)
    selected = select(q.bfloat16(), keys.bfloat16(), weights, [61], 4)
    rounded = select(q.bfloat16().float(), keys.bfloat16().float(), weights, [61], 4)
    assert torch.equal(selected, rounded)


def apart(visible: list[int], capacity: int) -> AttentionRanges:
    """Ranges of sequences whose entries are `capacity` rows apart; two queries of each."""
    start = np.repeat(np.arange(len(visible)) * capacity, 2)
    end = start + np.repeat(visible, 2)
    window = torch.zeros(len(start), dtype=torch.int64)
    return AttentionRanges(window, (), torch.tensor(start), torch.tensor(end), start, end)


def test_scores_of_empty_rows_between_sequences_are_not_computed(monkeypatch):
    visible, capacity = [40, 7, 60], 500
    q, keys, weights = rand(6, 2, 8, seed=1), rand(1500, 8, seed=2), rand(6, 2, seed=3)
    pairs = []

    def counted(q_nIJ: torch.Tensor, keys_cJ: torch.Tensor) -> torch.Tensor:
        pairs.append(len(q_nIJ) * len(keys_cJ))
        return dots(q_nIJ, keys_cJ)

    dots = select_eager._dots
    monkeypatch.setattr(select_eager, "_dots", counted)
    selected = select_topk(IndexerInputs(q, keys, weights), apart(visible, capacity), 5)
    assert sum(pairs) == 2 * sum(visible)
    for sequence, count in enumerate(visible):
        rows = slice(2 * sequence, 2 * sequence + 2)
        own = keys[sequence * capacity : sequence * capacity + count]
        alone = IndexerInputs(q[rows], own, weights[rows])
        expected = select_topk(alone, apart([count], capacity), 5) + sequence * capacity
        assert torch.equal(selected[rows], expected)


def test_a_gpu_computes_few_scores_of_several_sequences_together():
    def blocks(sequences: int, heads: int) -> list[slice]:
        ranges = apart([100] * sequences, 1000)
        start, end = ranges.host_entry_start_T, ranges.host_entry_end_T
        return [*select_eager._blocks(start, end, heads, torch.device("cuda"))]

    assert blocks(16, 8) == [slice(0, 32)]
    joined = blocks(64, 64)
    assert [block.start for block in joined[1:]] == [block.stop for block in joined[:-1]]
    assert 1 < len(joined) < 32 and joined[-1].stop == 128
