"""The key-value cache of a model: what its layers keep of the tokens that they have seen.

Each layer keeps the keys of its window as a ring, a row for every compressed entry, and the inputs
of the tokens that are not part of a complete window yet: one window of them, or two where windows
overlap. A CSA layer keeps the same for the keys of its indexer. Memory thus grows with the number
of entries only.

A cached step runs the same modules as training. As under context parallelism, they reach the tokens
that they do not hold through their `Exchange`; here it is the cache that has them.

B sequences; T new tokens of all of them; K head dim; J width of an index key; L assembled keys; C
entries; X any width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.cache.placement import EntryPlan, Placement, RingPlan, place
from model.cache.rows import PackedIndexKeys, PackedKV, PlainRows, Rows
from model.cache.sizes import tail_size
from model.config import LayerType, ModelConfig
from model.exchange import EntryKind, Exchange, LocalExchange, layer_type_of


@dataclass(frozen=True)
class _LayerRows:
    """What one layer keeps: keys, and for its entries and its index keys the rows and the tail."""

    keys: Rows
    entries: Mapping[EntryKind, Rows]
    tails: Mapping[EntryKind, PlainRows]


class Cache:
    """The cache of B sequences for some layers of a model.

    Attributes:
        lengths: tokens that each sequence has, on the host, [B].
        max_tokens: tokens that a sequence can have.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Mapping[int, LayerType],
        sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool = False,
        base: Exchange | None = None,
    ) -> None:
        """Allocates the whole cache.

        Args:
            layers: kind of each layer, by its index in the model.
            sequences: B.
            packed: whether keys and entries are in FP8 and index keys in MXFP4, as the report
                stores them. Lossless only inside `model.qat.fake_quantised`.
            base: the exchange between ranks that each hold all new tokens; by default of one rank.
        """
        self.config, self.max_tokens = config, max_tokens
        self.lengths = np.zeros(sequences, dtype=np.int64)
        self._device, self._dtype, self._packed = device, dtype, packed
        self._base = LocalExchange() if base is None else base
        self._rows = {index: self._allocate(kind) for index, kind in layers.items()}

    def _allocate(self, kind: LayerType) -> _LayerRows:
        config, sequences = self.config, len(self.lengths)
        ratio, width = config.compress_ratio(kind), config.head_dim
        keys = self._kv_rows(sequences * config.sliding_window)
        if not ratio:
            return _LayerRows(keys, {}, {})
        count = sequences * (self.max_tokens // ratio)
        entries: dict[EntryKind, Rows] = {"csa" if kind == "csa" else "hca": self._kv_rows(count)}
        widths: dict[EntryKind, int] = {name: width for name in entries}
        if kind == "csa" and self.max_tokens // ratio > config.index_topk:
            entries["index"] = self._index_rows(count)
            widths["index"] = config.index_head_dim
        halves = 2 if kind == "csa" else 1
        tail = sequences * tail_size(kind, ratio)
        tails = {
            name: PlainRows(tail, 2 * halves * width, torch.float32, self._device)
            for name, width in widths.items()
        }
        return _LayerRows(keys, entries, tails)

    def _kv_rows(self, count: int) -> Rows:
        width, rotary = self.config.head_dim, self.config.qk_rope_head_dim
        if self._packed:
            return PackedKV(count, width, rotary, self._dtype, self._device)
        return PlainRows(count, width, self._dtype, self._device)

    def _index_rows(self, count: int) -> Rows:
        width = self.config.index_head_dim
        if self._packed:
            return PackedIndexKeys(count, width, self._dtype, self._device)
        return PlainRows(count, width, self._dtype, self._device)

    def place(self, new: Sequence[int]) -> tuple[Placement, CacheExchange]:
        """Places `new[b]` tokens after those that sequence b has; `advance` makes them its own.

        Raises:
            ValueError: no new token, or a sequence longer than `max_tokens`.
        """
        after = self.lengths + np.asarray(new)
        if not sum(new) or min(new) < 0:
            raise ValueError(f"new tokens of each sequence should be 0 or more, got {list(new)}")
        if after.max() > self.max_tokens:
            raise ValueError(
                f"a sequence would have {after.max():,} tokens, but the cache holds "
                f"{self.max_tokens:,}"
            )
        placement = place(self.config, self.lengths, new, self.max_tokens, self._device)
        return placement, CacheExchange(self._rows, placement, self._base)

    def advance(self, new: Sequence[int]) -> None:
        """Counts tokens that have passed all layers."""
        self.lengths = self.lengths + np.asarray(new)

    def take_back(self, tokens: Sequence[int]) -> None:
        """Forgets the last tokens of each sequence: at most one of those of the last step."""
        if max(tokens) > 1:
            raise ValueError(f"at most one token can be taken back, got {list(tokens)}")
        self.lengths = self.lengths - np.asarray(tokens)

    def bytes_by_part(self) -> dict[tuple[LayerType, str], int]:
        """Memory of the tensors, by kind of layer and part. [bytes]"""
        sizes: dict[tuple[LayerType, str], int] = {}
        for rows in self._rows.values():
            kind: LayerType = "window"
            for name in rows.entries:
                kind = layer_type_of(name)
            parts = {"keys": rows.keys.num_bytes}
            for name, entries in rows.entries.items():
                label = "index keys" if name == "index" else "entries"
                parts[label] = entries.num_bytes
                parts["tails"] = parts.get("tails", 0) + rows.tails[name].num_bytes
            for part, size in parts.items():
                sizes[kind, part] = sizes.get((kind, part), 0) + size
        return sizes


class _ReplicatedTokens(LocalExchange):
    """An exchange of ranks that hold all tokens: only partial results are summed, by `base`."""

    def __init__(self, base: Exchange) -> None:
        self._base = base

    def reduce_scatter_queries(self, partial_TX: Tensor) -> Tensor:
        return self._base.reduce_scatter_queries(partial_TX)


class CacheExchange(_ReplicatedTokens):
    """The exchange of a cached step, for all layers; `of_layer` gives that of one of them."""

    def __init__(
        self, rows: Mapping[int, _LayerRows], placement: Placement, base: Exchange
    ) -> None:
        super().__init__(base)
        self._rows, self._placement = rows, placement

    def of_layer(self, layer_index: int) -> Exchange:
        return LayerCacheExchange(self._rows[layer_index], self._placement, self._base)


class LayerCacheExchange(_ReplicatedTokens):
    """The exchange of one layer: earlier keys, entries and inputs come from its cache.

    New ones are written into the cache on the way.
    """

    def __init__(self, rows: _LayerRows, placement: Placement, base: Exchange) -> None:
        super().__init__(base)
        self._rows, self._placement = rows, placement

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        plan = self._placement.keys
        keys_LK = _assemble(plan, self._rows.keys, local_TK)
        _keep(plan, self._rows.keys, local_TK)
        return keys_LK

    def prepend_halo(
        self, entries: EntryKind, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan, tail = self._plan(entries), self._rows.tails[entries]
        both_TX = torch.cat([values_TX, gates_TX], dim=1)
        if plan.any_complete:
            both = _assemble(plan.tail, tail, both_TX)
        else:  # nothing is pooled
            both = both_TX
        _keep(plan.tail, tail, both_TX)
        values, gates = both.chunk(2, dim=1)
        return values, gates

    def gather_entries(self, entries: EntryKind, pooled_CK: Tensor) -> Tensor:
        plan, rows = self._plan(entries), self._rows.entries[entries]
        if plan.any_complete:
            rows.write(plan.slots_C, pooled_CK.index_select(0, plan.new_C))
        if entries == "index":
            return rows.table(plan.visible_slots)
        return pooled_CK  # `attended_entries` reads the others

    def attended_entries(
        self, gathered_CK: Tensor, entries: EntryKind, selected_Tk: Tensor | None
    ) -> Tensor:
        rows = self._rows.entries[entries]
        if selected_Tk is None:
            return rows.table(self._plan(entries).visible_slots)
        selected = selected_Tk
        # Attention reads entry 0 in place of -1.
        return rows.table(lambda: selected.clamp(min=0).unique().long())

    def _plan(self, entries: EntryKind) -> EntryPlan:
        return self._placement.entries[layer_type_of(entries)]


def _assemble(plan: RingPlan, ring: Rows, new_TX: Tensor) -> Tensor:
    """Returns each sequence's earlier rows and new ones, one after another."""
    rows = new_TX.new_empty(plan.count, new_TX.shape[1])
    rows.index_copy_(0, plan.old_rows, ring.read(plan.old_slots))
    return rows.index_copy_(0, plan.new_rows, new_TX)


def _keep(plan: RingPlan, ring: Rows, new_TX: Tensor) -> None:
    ring.write(plan.kept_slots, new_TX.index_select(0, plan.kept_T))
