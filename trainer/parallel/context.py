"""Sequence parallelism: rows sharded over context and tensor ranks.

Every row is cut into runs of consecutive tokens, one for each rank of the sequence axis (context
and tensor flattened, tensor varying fastest). A rank's local tokens are its run of every row.
Tensor ranks shard heads, so each computes attention for the local tokens of all tensor ranks: its
queries, which are the context rank's run of every row.

Attention over a sharded row has two steps (report §3.4). First each rank receives the halo: the
tokens before its run that an incomplete compression window may need. It pools the windows that end
in its run, padded to the same number on all ranks. Then these entries are all-gathered and put into
the order of samples. Indices are computed on the host from the samples' lengths alone, so every
rank knows what all others send.

Letters: B rows, L tokens of a run, T tokens, K head dim, C entries, S samples, E experts, X any
width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import AttentionProbabilityMass
from model.layout import SampleLayout, on_device
from model.positions import Positions, TokenPositions, Windows, compress_ratios
from model.rope import layer_frequencies, rotation
from trainer.parallel.collectives import (
    all_gather,
    all_gather_tokens,
    all_reduce_,
    all_to_all_tokens,
    reduce_scatter,
    reduce_scatter_tokens,
    slice_tokens,
)
from trainer.parallel.grid import Axis, Grid


def shard_rows(
    config: ModelConfig, layout: SampleLayout, grid: Grid
) -> tuple[Positions, SequenceExchange]:
    """The positions of a rank's part of a microbatch with sharded rows, and its exchange."""
    device = layout.position_T.device
    ratios = compress_ratios(config)
    local, queries = _tokens_of(layout, grid.sequence), _tokens_of(layout, grid.context)
    frequencies = {
        compressed: layer_frequencies(config, compressed, device)
        for compressed in {ratio > 0 for ratio in ratios.values()}
    }
    pools = {
        kind: _WindowPlan(layout, ratio, kind == "csa", grid.sequence, frequencies[True])
        for kind, ratio in ratios.items()
        if ratio
    }

    def positions_of(tokens: np.ndarray) -> TokenPositions:
        position_T = layout.position_T[on_device(tokens, device)]
        return TokenPositions(
            {compressed: rotation(position_T, f) for compressed, f in frequencies.items()},
            {
                kind: _ranges(config, layout, ratio, tokens, len(queries), grid.context.size)
                for kind, ratio in ratios.items()
            },
        )

    positions = Positions(
        layout=layout.select(local, layout.seq_len // grid.sequence.size),
        microbatch=layout,
        ratios=ratios,
        local=positions_of(local),
        queries=positions_of(queries),
        windows_by_type={kind: pool.windows for kind, pool in pools.items()},
    )
    window = config.sliding_window
    return positions, SequenceExchange(layout, local, queries, ratios, pools, window, grid)


def _ranges(
    config: ModelConfig,
    layout: SampleLayout,
    ratio: int,
    tokens: np.ndarray,
    num_queries: int,
    context: int,
) -> AttentionRanges:
    """Ranges of some tokens; the ranges of keys are correct for queries only."""
    device, rows, window = layout.position_T.device, layout.rows, config.sliding_window
    halo = window - 1 if context > 1 else 0
    run = num_queries // rows
    start = np.maximum(layout.host_start_T[tokens], tokens - window + 1)
    # Key h + i of a row is its query i; rows follow each other with their halos.
    row, place = np.divmod(np.arange(len(tokens)), len(tokens) // rows)
    start = start - tokens + place + row * (halo + run) + halo
    segments: tuple[tuple[int, int, int], ...] = ((0, len(tokens), 0),)
    if halo:
        segments = tuple((row * run, (row + 1) * run, (row + 1) * halo) for row in range(rows))
    start_T = on_device(start, device)
    if ratio == 0:
        return AttentionRanges(start_T, segments)
    entries = layout.entries(ratio)
    index = on_device(tokens, device)
    return AttentionRanges(
        start_T,
        segments,
        entries.start_T[index],
        entries.end_T[index],
        entries.host_start_T[tokens],
        entries.host_end_T[tokens],
    )


class SequenceExchange:
    """`model.exchange.Exchange` of a rank that holds a part of every row of a microbatch."""

    def __init__(
        self,
        layout: SampleLayout,
        local: np.ndarray,
        queries: np.ndarray,
        ratios: Mapping[LayerType, int],
        pools: Mapping[LayerType, _WindowPlan],
        window: int,
        grid: Grid,
    ) -> None:
        self.layout, self.rows, self.window = layout, layout.rows, window
        self.tensor, self.context, self.sequence = grid.tensor, grid.context, grid.sequence
        self._ratios, self._pools, self._queries = ratios, pools, queries
        device = layout.position_T.device
        self._local_T, self._queries_T = on_device(local, device), on_device(queries, device)

    def local_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T[self._local_T]

    def queries_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T[self._queries_T]

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        gather = all_gather_tokens if local_TX.is_floating_point() else all_gather
        return _swap_leading(gather(local_TX, self.tensor), self.tensor.size, self.rows)

    def local_of_queries(self, query_TX: Tensor) -> Tensor:
        return slice_tokens(_swap_leading(query_TX, self.rows, self.tensor.size), self.tensor)

    def scatter_sum(self, partial_TX: Tensor) -> Tensor:
        return reduce_scatter_tokens(
            _swap_leading(partial_TX, self.rows, self.tensor.size), self.tensor
        )

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        keys_TK = self.gather_queries(local_TK)
        if self.context.size == 1:
            return keys_TK
        return with_halo(keys_TK, self.rows, self.window - 1, self.context)

    def prepend_halo(
        self, kind: LayerType, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        both = torch.cat([values_TX, gates_TX], dim=-1)
        halo = self._pools[kind].halo
        values, gates = with_halo(both, self.rows, halo, self.sequence).chunk(2, dim=-1)
        return values, gates

    def gather_entries(self, kind: LayerType, pooled_CK: Tensor) -> Tensor:
        return self._pools[kind].gather(pooled_CK)

    def sum_mass(
        self, kind: LayerType, mass: AttentionProbabilityMass, selected_only: bool
    ) -> AttentionProbabilityMass:
        tensor = self.tensor
        if tensor.size == 1:
            return mass
        run = self.layout.seq_len // self.sequence.size
        entries = self.layout.entries(self._ratios[kind])
        assert entries.host_start_T is not None and entries.host_end_T is not None
        # By tensor rank, its local tokens' places among the queries and what they see.
        first = np.arange(self.rows)[:, None] * (tensor.size * run) + np.arange(run)
        places = [(first + rank * run).ravel() for rank in range(tensor.size)]
        starts = [entries.host_start_T[self._queries[place]] for place in places]
        ends = [entries.host_end_T[self._queries[place]] for place in places]
        places_T = [on_device(place, self._local_T.device) for place in places]

        def columns_of(rank: int, rows: slice) -> slice:
            low = int(starts[rank][rows.start])
            return slice(low, max(int(ends[rank][rows].max()), low))

        def summed(rows: slice, columns: slice) -> Tensor:
            """Reduce-scatters the mass that each rank needs, over the heads of all ranks."""
            wanted = [columns if selected_only else columns_of(r, rows) for r in range(tensor.size)]
            width = max(part.stop - part.start for part in wanted)
            parts = [mass(places_T[r][rows], part) for r, part in enumerate(wanted)]
            padded = [F.pad(part, (0, width - part.shape[1])) for part in parts]
            return reduce_scatter(torch.cat(padded), tensor)[:, : columns.stop - columns.start]

        return summed

    def sum_counts(self, counts_ZE: Tensor) -> Tensor:
        return all_reduce_(counts_ZE, self.sequence)


class _WindowPlan:
    """The compression windows of m tokens that a rank pools, and the places of its entries.

    A rank pools the windows whose last token is in its run. So it needs the m - 1 tokens before the
    run, or 2m - 1 where windows overlap. With overlap, the window before a rank's first one is
    pooled as well (a "helper") and its entry dropped, where another rank owns it.
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
        self.max_entries = max((len(share) for share in shares), default=0)

        local_C = shares[sequence.rank]
        # A helper before every window whose predecessor belongs to another rank.
        helper = has_previous_C[local_C] & (owner_C[np.maximum(local_C - 1, 0)] != sequence.rank)
        helper &= overlap
        pooled = np.sort(np.concatenate([local_C, local_C[helper] - 1]))
        self._without_helpers = on_device(np.searchsorted(pooled, local_C), device)
        begin = sequence.rank * run - self.halo  # where a row's tokens begin, with the halo
        first = first_C[pooled] - row_C[pooled] * layout.seq_len - begin
        first += row_C[pooled] * (self.halo + run)
        helps = ~np.isin(pooled, local_C)
        self.windows = Windows(
            on_device(first, device),
            on_device(has_previous_C[pooled] & ~helps, device),
            rotation(on_device(position_C[pooled], device), frequencies),
        )
        order = np.empty(len(first_C), dtype=np.int64)
        for rank, share in enumerate(shares):
            order[share] = rank * self.max_entries + np.arange(len(share))
        self._order = on_device(order, device)

    def gather(self, pooled_CK: Tensor) -> Tensor:
        """The entries of all ranks, sample after sample, [C, K]."""
        local_CK = pooled_CK.index_select(0, self._without_helpers)
        if self.max_entries == 0:
            return local_CK
        padded = F.pad(local_CK, (0, 0, 0, self.max_entries - len(local_CK)))
        return all_gather_tokens(padded, self.sequence).index_select(0, self._order)


def with_halo(x_TX: Tensor, rows: int, halo: int, axis: Axis) -> Tensor:
    """Prepends to each row's run the `halo` tokens that precede it in the row.

    They may come from more than one rank; zeros stand before a row's first token. [B·L, X] to
    [B·(halo+L), X].
    """
    runs = x_TX.unflatten(0, (rows, -1))
    length = runs.shape[1]

    def need(distance: int) -> int:
        """How many of a rank's last tokens of a row the rank `distance` later needs."""
        return min(length, max(0, halo - (distance - 1) * length)) if distance > 0 else 0

    send = [need(rank - axis.rank) for rank in range(axis.size)]
    receive = [need(axis.rank - rank) for rank in range(axis.size)]
    parts = [runs[:, length - count :].flatten(0, 1) for count in send]
    counts = [rows * n for n in send], [rows * n for n in receive]
    received = all_to_all_tokens(torch.cat(parts), *counts, axis)
    # Empty pieces stay: every rank must use the exchange's output, or backward would not run it.
    pieces = [piece.unflatten(0, (rows, -1)) for piece in received.split(counts[1])]
    missing = halo - sum(receive)
    if missing:
        pieces.insert(0, runs.new_zeros(rows, missing, runs.shape[2]))
    return torch.cat([*pieces, runs], dim=1).flatten(0, 1)


def _tokens_of(layout: SampleLayout, axis: Axis) -> np.ndarray:
    """Flat indices of a rank's run of every row."""
    run = layout.seq_len // axis.size
    first = np.arange(layout.rows)[:, None] * layout.seq_len + axis.rank * run
    return (first + np.arange(run)).ravel()


def _swap_leading(x_TX: Tensor, outer: int, inner: int) -> Tensor:
    """Swaps the two leading dims of [outer, inner, L, …] flattened to [T, …]."""
    if outer == 1 or inner == 1:
        return x_TX
    return x_TX.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
