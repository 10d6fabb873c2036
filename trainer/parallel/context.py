"""Rows divided over ranks: where a rank's tokens are, and how it reaches those of others.

Every row is cut into one run of tokens per rank of the sequence axis (context and tensor ranks
together, tensor ranks next to each other). A rank's own tokens are its run of every row. Tensor
ranks split heads, so each computes attention for the own tokens of all of them: its queries, the
context rank's run of every row.

Attention over a divided row has two stages (report 3.4): each rank takes the raw values of the
tokens before its own, as many as an incomplete window may need, and pools the windows that end in
its run, padded to a number that is the same on all ranks; these entries are gathered and put into
the order of samples. All index arithmetic is on the host, from the samples' lengths alone, so
every rank knows what all others send.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import AttentionProbabilityMass
from model.layout import SampleLayout, on_device
from model.positions import Positions, Windows
from model.rope import layer_frequencies, rotation
from trainer.parallel.collectives import (
    all_gather,
    exchange,
    gather_tokens,
    own_part,
    reduce_scatter,
    scatter_sum,
    sum_,
)
from trainer.parallel.grid import Axis, Grid


class SequencePositions(Positions):
    """`Positions` of a rank that holds a part of every row."""

    def __init__(self, config: ModelConfig, layout: SampleLayout, grid: Grid) -> None:
        self.whole = layout
        self.tensor, self.context, self.sequence = grid.tensor, grid.context, grid.sequence
        self.rows = layout.rows
        self.window = config.sliding_window
        self._own = _tokens_of(layout, self.sequence)
        self._queries = _tokens_of(layout, self.context)
        device = layout.position_T.device
        self._own_T = on_device(self._own, device)
        self._queries_T = on_device(self._queries, device)
        self.layout = layout.part(self._own, layout.seq_len // self.sequence.size)
        self._ratio = {
            kind: config.compress_ratio(kind) for kind in {*config.layer_types, "window"}
        }
        frequencies = {
            compressed: layer_frequencies(config, compressed, device)
            for compressed in {ratio > 0 for ratio in self._ratio.values()}
        }
        query_position_T = layout.position_T[self._queries_T]
        self._rotation = {c: rotation(self.layout.position_T, f) for c, f in frequencies.items()}
        self._query_rotation = {c: rotation(query_position_T, f) for c, f in frequencies.items()}
        self._pools = {
            kind: _Pool(layout, ratio, kind == "csa", self.sequence, frequencies[True])
            for kind, ratio in self._ratio.items()
            if ratio
        }
        self._windows = {kind: pool.windows for kind, pool in self._pools.items()}
        self._ranges = {
            kind: self._ranges_of(ratio, self._own) for kind, ratio in self._ratio.items()
        }
        self._query_ranges = {
            kind: self._ranges_of(ratio, self._queries) for kind, ratio in self._ratio.items()
        }

    def _ranges_of(self, ratio: int, tokens: np.ndarray) -> AttentionRanges:
        """Ranges of some tokens; those of keys are right for the queries only."""
        device = self.whole.position_T.device
        halo = self.window - 1 if self.context.size > 1 else 0
        run = len(self._queries) // self.rows
        start = np.maximum(self.whole.host_start_T[tokens], tokens - self.window + 1)
        # Key h + i of a row is its query i; rows follow each other with their halos.
        row, place = np.divmod(np.arange(len(tokens)), len(tokens) // self.rows)
        start = start - tokens + place + row * (halo + run) + halo
        segments: tuple[tuple[int, int, int], ...] = ((0, len(tokens), 0),)
        if halo:
            segments = tuple(
                (row * run, (row + 1) * run, (row + 1) * halo) for row in range(self.rows)
            )
        start_T = on_device(start, device)
        if ratio == 0:
            return AttentionRanges(start_T, segments)
        entries = self.whole.entries(ratio)
        index = on_device(tokens, device)
        return AttentionRanges(
            start_T,
            segments,
            entries.start_T[index],
            entries.end_T[index],
            entries.host_start_T[tokens],
            entries.host_end_T[tokens],
        )

    def most_visible(self, kind: LayerType) -> int:
        return self.whole.entries(self._ratio[kind]).most_visible

    def query_rotation(self, kind: LayerType) -> Tensor:
        return self._query_rotation[self._ratio[kind] > 0]

    def query_ranges(self, kind: LayerType) -> AttentionRanges:
        return self._query_ranges[kind]

    def own(self, whole_T: Tensor) -> Tensor:
        return whole_T[self._own_T]

    def queries(self, whole_T: Tensor) -> Tensor:
        return whole_T[self._queries_T]

    def to_queries(self, own_TX: Tensor) -> Tensor:
        gather = gather_tokens if own_TX.is_floating_point() else all_gather
        return _by_row(gather(own_TX, self.tensor), self.tensor.size, self.rows)

    def pick_own(self, query_TX: Tensor) -> Tensor:
        return own_part(_by_row(query_TX, self.rows, self.tensor.size), self.tensor)

    def to_own(self, partial_TX: Tensor) -> Tensor:
        return scatter_sum(_by_row(partial_TX, self.rows, self.tensor.size), self.tensor)

    def keys(self, own_TK: Tensor) -> Tensor:
        keys_TK = self.to_queries(own_TK)
        if self.context.size == 1:
            return keys_TK
        return with_halo(keys_TK, self.rows, self.window - 1, self.context)

    def with_previous(
        self, kind: LayerType, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        both = torch.cat([values_TX, gates_TX], dim=-1)
        halo = self._pools[kind].halo
        values, gates = with_halo(both, self.rows, halo, self.sequence).chunk(2, dim=-1)
        return values, gates

    def all_entries(self, kind: LayerType, pooled_CK: Tensor) -> Tensor:
        return self._pools[kind].gather(pooled_CK)

    def own_mass(
        self, kind: LayerType, mass: AttentionProbabilityMass, listed: bool
    ) -> AttentionProbabilityMass:
        tensor = self.tensor
        if tensor.size == 1:
            return mass
        run = self.layout.seq_len
        entries = self.whole.entries(self._ratio[kind])
        assert entries.host_start_T is not None and entries.host_end_T is not None
        # By tensor rank, its own tokens' places among the queries and what they see.
        first = np.arange(self.rows)[:, None] * (tensor.size * run) + np.arange(run)
        places = [(first + rank * run).ravel() for rank in range(tensor.size)]
        starts = [entries.host_start_T[self._queries[place]] for place in places]
        ends = [entries.host_end_T[self._queries[place]] for place in places]
        there = [on_device(place, self._own_T.device) for place in places]

        def columns_of(rank: int, rows: slice) -> slice:
            low = int(starts[rank][rows.start])
            return slice(low, max(int(ends[rank][rows].max()), low))

        def own(rows: slice, columns: slice) -> Tensor:
            """Every rank adds its heads' share of what the others ask for."""
            asked = [columns if listed else columns_of(r, rows) for r in range(tensor.size)]
            width = max(part.stop - part.start for part in asked)
            found = [mass(there[r][rows], part) for r, part in enumerate(asked)]
            padded = [F.pad(part, (0, width - part.shape[1])) for part in found]
            return reduce_scatter(torch.cat(padded), tensor)[:, : columns.stop - columns.start]

        return own

    def sum_counts(self, counts_SE: Tensor) -> Tensor:
        return sum_(counts_SE, self.sequence)


class _Pool:
    """Which windows of m tokens a rank pools, and where its entries stand among all.

    A rank pools the windows whose last token is its own, so it needs m - 1 tokens before its run,
    or 2m - 1 where a window overlaps the one before. In that case, where a row's first window here
    has one before it, that helper is pooled along and dropped.
    """

    def __init__(
        self, layout: SampleLayout, ratio: int, overlap: bool, sequence: Axis, frequencies: Tensor
    ) -> None:
        self.halo, self.sequence = (2 if overlap else 1) * ratio - 1, sequence
        entries = layout.entries(ratio)
        device = entries.first_token_C.device
        first_C, position_C = entries.host_first_token_C, entries.host_position_C
        has_previous_C = position_C > 0
        run = layout.seq_len // sequence.size
        row_C, place_C = np.divmod(first_C + ratio - 1, layout.seq_len)
        owner_C = place_C // run
        shares = [np.flatnonzero(owner_C == rank) for rank in range(sequence.size)]
        self.most = max((len(share) for share in shares), default=0)

        mine = shares[sequence.rank]
        # A helper before every own window whose predecessor another rank owns.
        helper = has_previous_C[mine] & (owner_C[np.maximum(mine - 1, 0)] != sequence.rank)
        helper &= overlap
        pooled = np.sort(np.concatenate([mine, mine[helper] - 1]))
        self._kept = on_device(np.searchsorted(pooled, mine), device)
        begin = sequence.rank * run - self.halo  # where a row's tokens begin, halo included
        local = first_C[pooled] - row_C[pooled] * layout.seq_len - begin
        local += row_C[pooled] * (self.halo + run)
        helps = ~np.isin(pooled, mine)
        self.windows = Windows(
            on_device(local, device),
            on_device(has_previous_C[pooled] & ~helps, device),
            rotation(on_device(position_C[pooled], device), frequencies),
        )
        order = np.empty(len(first_C), dtype=np.int64)
        for rank, share in enumerate(shares):
            order[share] = rank * self.most + np.arange(len(share))
        self._order = on_device(order, device)

    def gather(self, pooled_CK: Tensor) -> Tensor:
        """The entries of all ranks, sample after sample, [C, K]."""
        mine = pooled_CK.index_select(0, self._kept)
        if self.most == 0:
            return mine
        padded = F.pad(mine, (0, 0, 0, self.most - len(mine)))
        return gather_tokens(padded, self.sequence).index_select(0, self._order)


def with_halo(x_TX: Tensor, rows: int, halo: int, axis: Axis) -> Tensor:
    """Before each row's run of tokens the `halo` tokens that precede it in the row.

    They may come from more than one rank; before a row's begin there are zeros. [B·L, X] to
    [B·(halo+L), X].
    """
    runs = x_TX.unflatten(0, (rows, -1))
    length = runs.shape[1]

    def need(places: int) -> int:
        """How many of a rank's last tokens the rank some places on needs of each row."""
        return min(length, max(0, halo - (places - 1) * length)) if places > 0 else 0

    send = [need(rank - axis.rank) for rank in range(axis.size)]
    receive = [need(axis.rank - rank) for rank in range(axis.size)]
    parts = [runs[:, length - count :].flatten(0, 1) for count in send]
    come = exchange(torch.cat(parts), [rows * n for n in send], [rows * n for n in receive], axis)
    # Empty pieces stay: what came must be used on every rank, or backward would send it on some.
    pieces = [piece.unflatten(0, (rows, -1)) for piece in come.split([rows * n for n in receive])]
    missing = halo - sum(receive)
    if missing:
        pieces.insert(0, runs.new_zeros(rows, missing, runs.shape[2]))
    return torch.cat([*pieces, runs], dim=1).flatten(0, 1)


def _tokens_of(layout: SampleLayout, axis: Axis) -> np.ndarray:
    """Flat indices of a rank's run of every row."""
    run = layout.seq_len // axis.size
    first = np.arange(layout.rows)[:, None] * layout.seq_len + axis.rank * run
    return (first + np.arange(run)).ravel()


def _by_row(x_TX: Tensor, outer: int, inner: int) -> Tensor:
    """Exchange the two leading dims of [outer, inner, L, …] flattened to [T, …]."""
    if outer == 1 or inner == 1:
        return x_TX
    return x_TX.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
