"""Context and sequence parallelism: rows sharded over context ranks, then over tensor ranks.

Every row is cut into chunks of consecutive tokens, one for each rank of the sequence axis (context
x tensor flattened, tensor fastest). A rank's local tokens are its chunk of every row. Tensor ranks
shard heads, so each computes attention for the local tokens of all tensor ranks: its queries, which
are the context rank's chunk of every row.

Keys of the sliding window: each rank receives a halo of window - 1 keys before its queries.
Compressed entries (report §3.4; docs/architecture-v4.md): each rank receives a halo of the tokens
before its chunk that belong to compression windows ending in it, and pools these windows. Their
entries, padded to the same number on all ranks, are all-gathered and put into the order of samples.
Indices are computed on the host from the samples'
lengths alone, so every rank knows what all others send.

Letters: B rows, U tokens of a chunk, T tokens, K head dim, C entries, Z samples, E experts, X any
width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.exchange import EntryKind, Exchange, layer_type_of
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import MassFunction
from model.layout import SampleLayout, on_device
from model.positions import CompressionWindows, Positions, TokenPositions, compress_ratios
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
    """Returns the Positions and the Exchange of this rank where rows are sharded."""
    device = layout.position_T.device
    ratios = compress_ratios(config)
    local, queries = _tokens_of(layout, grid.sequence), _tokens_of(layout, grid.context)
    frequencies = {
        compressed: on_device(layer_frequencies(config, compressed).numpy(), device)
        for compressed in {ratio > 0 for ratio in ratios.values()}
    }
    window_plans = {
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
        windows_by_type={kind: plan.windows for kind, plan in window_plans.items()},
    )
    exchange = SequenceExchange(
        layout, local, queries, ratios, window_plans, config.sliding_window, grid
    )
    return positions, exchange


def _ranges(
    config: ModelConfig,
    layout: SampleLayout,
    ratio: int,
    tokens: np.ndarray,
    num_queries: int,
    context_size: int,
) -> AttentionRanges:
    """Returns the ranges of these tokens; key ranges are valid only if they are the queries."""
    device, rows, window = layout.position_T.device, layout.rows, config.sliding_window
    halo = window - 1 if context_size > 1 else 0
    chunk = num_queries // rows
    start = np.maximum(layout.host_start_T[tokens], tokens - window + 1)
    # In each row, key halo + i is query i's own; rows with their halos are concatenated.
    row, index = np.divmod(np.arange(len(tokens)), len(tokens) // rows)
    start = start - tokens + index + row * (halo + chunk) + halo
    segments: tuple[tuple[int, int, int], ...] = ((0, len(tokens), 0),)
    if halo:
        segments = tuple((row * chunk, (row + 1) * chunk, (row + 1) * halo) for row in range(rows))
    start_T = on_device(start, device)
    if ratio == 0:
        return AttentionRanges(start_T, segments)
    entries = layout.entries(ratio)
    tokens_T = on_device(tokens, device)
    return AttentionRanges(
        start_T,
        segments,
        entries.start_T[tokens_T],
        entries.end_T[tokens_T],
        entries.host_start_T[tokens],
        entries.host_end_T[tokens],
    )


class SequenceExchange:
    """`model.exchange.Exchange` of a rank that holds a chunk of every row of a microbatch."""

    def __init__(
        self,
        layout: SampleLayout,
        local: np.ndarray,
        queries: np.ndarray,
        ratios: Mapping[LayerType, int],
        window_plans: Mapping[LayerType, _WindowPlan],
        window: int,
        grid: Grid,
    ) -> None:
        self.layout, self.rows, self.window = layout, layout.rows, window
        self.tensor, self.context, self.sequence = grid.tensor, grid.context, grid.sequence
        self._ratios, self._window_plans, self._queries = ratios, window_plans, queries
        device = layout.position_T.device
        self._local_T, self._queries_T = on_device(local, device), on_device(queries, device)

    def of_layer(self, layer_index: int) -> Exchange:
        return self

    def local_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T[self._local_T]

    def queries_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T[self._queries_T]

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        gather = all_gather_tokens if local_TX.is_floating_point() else all_gather
        return _swap_leading(gather(local_TX, self.tensor), self.tensor.size, self.rows)

    def local_of_queries(self, query_TX: Tensor) -> Tensor:
        return slice_tokens(_swap_leading(query_TX, self.rows, self.tensor.size), self.tensor)

    def reduce_scatter_queries(self, partial_TX: Tensor) -> Tensor:
        return reduce_scatter_tokens(
            _swap_leading(partial_TX, self.rows, self.tensor.size), self.tensor
        )

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        keys_TK = self.gather_queries(local_TK)
        if self.context.size == 1:
            return keys_TK
        return with_halo(keys_TK, self.rows, self.window - 1, self.context)

    def prepend_halo(
        self, entries: EntryKind, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        both = torch.cat([values_TX, gates_TX], dim=-1)
        halo = self._window_plans[layer_type_of(entries)].halo
        values, gates = with_halo(both, self.rows, halo, self.sequence).chunk(2, dim=-1)
        return values, gates

    def gather_entries(self, entries: EntryKind, pooled_CK: Tensor) -> Tensor:
        return self._window_plans[layer_type_of(entries)].gather(pooled_CK)

    def attended_entries(
        self, gathered_CK: Tensor, entries: EntryKind, selected_Tk: Tensor | None
    ) -> Tensor:
        return gathered_CK

    def sum_mass(self, kind: LayerType, mass: MassFunction, selected_only: bool) -> MassFunction:
        tensor = self.tensor
        if tensor.size == 1:
            return mass
        chunk = self.layout.seq_len // self.sequence.size
        entries = self.layout.entries(self._ratios[kind])
        # For each tensor rank: indices of its local tokens among the queries, and the entries that
        # they see.
        first = np.arange(self.rows)[:, None] * (tensor.size * chunk) + np.arange(chunk)
        indices = [(first + rank * chunk).ravel() for rank in range(tensor.size)]
        starts = [entries.host_start_T[self._queries[index]] for index in indices]
        ends = [entries.host_end_T[self._queries[index]] for index in indices]
        indices_T = [on_device(index, self._local_T.device) for index in indices]

        def columns_of(rank: int, rows: slice) -> slice:
            low = int(starts[rank][rows.start])
            return slice(low, max(int(ends[rank][rows].max()), low))

        def total_mass(rows: slice, columns: slice) -> Tensor:
            """Reduce-scatters the mass that each rank needs, over the heads of all ranks."""
            needed = [columns if selected_only else columns_of(r, rows) for r in range(tensor.size)]
            width = max(part.stop - part.start for part in needed)
            parts = [mass(indices_T[r][rows], part) for r, part in enumerate(needed)]
            padded = [F.pad(part, (0, width - part.shape[1])) for part in parts]
            return reduce_scatter(torch.cat(padded), tensor)[:, : columns.stop - columns.start]

        return total_mass

    def sum_counts(self, counts_ZE: Tensor) -> Tensor:
        return all_reduce_(counts_ZE, self.sequence)


class _WindowPlan:
    """The windows of m tokens that a rank pools, and where its entries go in the gathered order.

    A rank pools the windows whose last token is in its chunk. So it needs the m - 1 tokens before
    the chunk, or 2m - 1 where windows overlap. With overlap, a window also pools its predecessor's
    tokens. Where the predecessor belongs to another rank, this rank pools it as well and drops its
    entry (a "helper"; at most one per row).
    """

    def __init__(
        self, layout: SampleLayout, ratio: int, overlap: bool, sequence: Axis, frequencies: Tensor
    ) -> None:
        self.halo, self.sequence = (2 if overlap else 1) * ratio - 1, sequence
        entries = layout.entries(ratio)
        device = entries.first_token_C.device
        first_C, position_C = entries.host_first_token_C, entries.host_position_C
        has_previous_C = position_C > 0
        chunk = layout.seq_len // sequence.size
        row_C, last_C = np.divmod(first_C + ratio - 1, layout.seq_len)
        owner_C = last_C // chunk
        entries_of_rank = [np.flatnonzero(owner_C == rank) for rank in range(sequence.size)]
        self.max_entries = max((len(local) for local in entries_of_rank), default=0)

        local_C = entries_of_rank[sequence.rank]
        # A helper before every window whose predecessor belongs to another rank.
        helper = has_previous_C[local_C] & (owner_C[np.maximum(local_C - 1, 0)] != sequence.rank)
        helper &= overlap
        pooled = np.sort(np.concatenate([local_C, local_C[helper] - 1]))
        self._without_helpers = on_device(np.searchsorted(pooled, local_C), device)
        # Index in the row of the first token that this rank holds, halo included.
        begin = sequence.rank * chunk - self.halo
        first = first_C[pooled] - row_C[pooled] * layout.seq_len - begin
        first += row_C[pooled] * (self.halo + chunk)
        is_helper = ~np.isin(pooled, local_C)
        self.windows = CompressionWindows(
            on_device(first, device),
            on_device(has_previous_C[pooled] & ~is_helper, device),
            rotation(on_device(position_C[pooled], device), frequencies),
        )
        order = np.empty(len(first_C), dtype=np.int64)
        for rank, local in enumerate(entries_of_rank):
            order[local] = rank * self.max_entries + np.arange(len(local))
        self._order = on_device(order, device)

    def gather(self, pooled_CK: Tensor) -> Tensor:
        """Returns the entries of all ranks in the order of samples, [C, K]."""
        local_CK = pooled_CK.index_select(0, self._without_helpers)
        if self.max_entries == 0:
            return local_CK
        padded = F.pad(local_CK, (0, 0, 0, self.max_entries - len(local_CK)))
        return all_gather_tokens(padded, self.sequence).index_select(0, self._order)


def with_halo(x_TX: Tensor, rows: int, halo: int, axis: Axis) -> Tensor:
    """Prepends to each row's chunk the `halo` tokens that precede it in the row.

    They may come from more than one rank; zeros stand before a row's first token. [B·U, X] to
    [B·(halo+U), X].
    """
    chunks = x_TX.unflatten(0, (rows, -1))
    length = chunks.shape[1]

    def need(distance: int) -> int:
        """Number of trailing tokens of a chunk that the rank `distance` places further on needs."""
        return min(length, max(0, halo - (distance - 1) * length)) if distance > 0 else 0

    send = [need(rank - axis.rank) for rank in range(axis.size)]
    receive = [need(axis.rank - rank) for rank in range(axis.size)]
    parts = [chunks[:, length - count :].flatten(0, 1) for count in send]
    counts = [rows * n for n in send], [rows * n for n in receive]
    received = all_to_all_tokens(torch.cat(parts), *counts, axis)
    # Empty pieces stay: every rank must use the all-to-all's output, or its backward would not take
    # part in the collective.
    pieces = [piece.unflatten(0, (rows, -1)) for piece in received.split(counts[1])]
    missing = halo - sum(receive)
    if missing:
        pieces.insert(0, chunks.new_zeros(rows, missing, chunks.shape[2]))
    return torch.cat([*pieces, chunks], dim=1).flatten(0, 1)


def _tokens_of(layout: SampleLayout, axis: Axis) -> np.ndarray:
    """Returns the flat indices of a rank's chunk of every row."""
    chunk = layout.seq_len // axis.size
    first = np.arange(layout.rows)[:, None] * layout.seq_len + axis.rank * chunk
    return (first + np.arange(chunk)).ravel()


def _swap_leading(x_TX: Tensor, outer: int, inner: int) -> Tensor:
    """Swaps the two leading dims of [outer, inner, U, …] flattened to [T, …]."""
    if outer == 1 or inner == 1:
        return x_TX
    return x_TX.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
