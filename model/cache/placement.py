"""Where the new tokens of cached sequences are, and what they see: once for all layers.

Indices are computed on the host from the sequences' lengths alone.

B sequences; T new tokens of all of them; L keys that the queries' windows need; C entries that are
pooled; m tokens of an entry's window; r complex numbers of a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.cache.sizes import tail_size
from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.layout import SampleLayout, on_device
from model.positions import CompressionWindows, Positions, TokenPositions, compress_ratios
from model.rope import layer_frequencies, rotation


@dataclass(frozen=True)
class RingPlan:
    """Rows of a ring that a step reads before its own rows, and those that it writes.

    A ring keeps the last `size` rows of each sequence: that of position p is in slot p % size. The
    assembled rows are, for each sequence, some of its earlier rows and then its new ones.

    Attributes:
        count: number of assembled rows.
        old_slots, old_rows: slots that are read, and the assembled rows that they become.
        new_rows: assembled row of each new token, [T].
        kept_T, kept_slots: new tokens that stay in the ring, and their slots.
    """

    count: int
    old_slots: Tensor
    old_rows: Tensor
    new_rows: Tensor
    kept_T: Tensor
    kept_slots: Tensor


@dataclass(frozen=True)
class EntryPlan:
    """Windows that a step completes, and where their entries go.

    Attributes:
        tail: the ring of inputs of windows that are not complete.
        windows: what the compressor pools; indices are those of the assembled rows.
        any_complete: whether a new entry is made.
        new_C: pooled windows that are new entries; the others serve the overlap.
        slots_C: the entries' rows in the cache.
        visible_B: entries of each sequence that new tokens may see, on the host.
        capacity: rows of a sequence.
    """

    tail: RingPlan
    windows: CompressionWindows
    any_complete: bool
    new_C: Tensor
    slots_C: Tensor
    visible_B: np.ndarray
    capacity: int

    def visible_slots(self) -> Tensor:
        """Returns the rows of all entries that new tokens may see."""
        sequence, index = _within(self.visible_B)
        return on_device(sequence * self.capacity + index, self.slots_C.device)


@dataclass(frozen=True)
class CachedPositions(Positions):
    """Positions of the new tokens. `max_tokens` is what each sequence of the cache can hold."""

    max_tokens: int = 0

    def max_visible(self, kind: LayerType) -> int:
        """The largest number of entries that a query of this cache may ever see."""
        return self.max_tokens // self.ratios[kind]


@dataclass(frozen=True)
class Placement:
    """The new tokens of a step: their positions, and what each kind of layer reads and writes."""

    layout: SampleLayout
    positions: CachedPositions
    keys: RingPlan
    entries: Mapping[LayerType, EntryPlan]


def place(
    config: ModelConfig,
    lengths: np.ndarray,
    new: Sequence[int],
    max_tokens: int,
    device: torch.device,
) -> Placement:
    """Places `new[b]` tokens of each sequence after the `lengths[b]` tokens that it has."""
    new_B = np.asarray(new)
    ratios = compress_ratios(config)
    layout = SampleLayout.from_lengths([[n for n in new if n]], device=device)
    sequence_T = np.repeat(np.arange(len(new_B)), new_B)
    first_T = np.cumsum(new_B) - new_B
    position_T = np.arange(new_B.sum()) - first_T[sequence_T] + lengths[sequence_T]

    window = config.sliding_window
    keys, own_T = _ring_plan(lengths, new_B, np.minimum(lengths, window - 1), window, device)
    window_start = own_T - np.minimum(position_T, window - 1)
    segments = tuple(
        (int(start), int(start + count), int(own_T[start] - start))
        for start, count in zip(first_T, new_B, strict=True)
        if count
    )
    frequencies = {
        compressed: on_device(layer_frequencies(config, compressed=compressed).numpy(), device)
        for compressed in {False} | {ratio > 0 for ratio in ratios.values()}
    }
    on_device_T = on_device(position_T, device)
    ranges, plans = {}, {}
    for kind, ratio in ratios.items():
        start_T = on_device(window_start, device)
        if not ratio:
            ranges[kind] = AttentionRanges(start_T, segments)
            continue
        plans[kind] = _entry_plan(
            kind, ratio, lengths, new_B, max_tokens // ratio, frequencies[True], device
        )
        first = sequence_T * (max_tokens // ratio)
        end = first + (position_T + 1) // ratio
        ranges[kind] = AttentionRanges(
            start_T, segments, on_device(first, device), on_device(end, device), first, end
        )
    tokens = TokenPositions({c: rotation(on_device_T, f) for c, f in frequencies.items()}, ranges)
    windows = {kind: plan.windows for kind, plan in plans.items()}
    positions = CachedPositions(layout, layout, ratios, tokens, tokens, windows, max_tokens)
    return Placement(layout, positions, keys, plans)


def _ring_plan(
    lengths: np.ndarray, new_B: np.ndarray, old_B: np.ndarray, size: int, device: torch.device
) -> tuple[RingPlan, np.ndarray]:
    """Plans rows of a ring: the last `old_B` rows of each sequence, then its new ones.

    Returns the plan, and the assembled row of each new token on the host.
    """
    both_B = old_B + new_B
    start_B = np.cumsum(both_B) - both_B

    sequence, index = _within(old_B)
    old_slots = sequence * size + ((lengths - old_B)[sequence] + index) % size
    old_rows = start_B[sequence] + index
    sequence, index = _within(new_B)
    new_rows = (start_B + old_B)[sequence] + index
    kept = np.flatnonzero(index >= new_B[sequence] - size)
    kept_slots = sequence[kept] * size + (lengths[sequence[kept]] + index[kept]) % size
    arrays = (old_slots, old_rows, new_rows, kept, kept_slots)
    plan = RingPlan(int(both_B.sum()), *(on_device(array, device) for array in arrays))
    return plan, new_rows


def _entry_plan(
    kind: LayerType,
    ratio: int,
    lengths: np.ndarray,
    new_B: np.ndarray,
    capacity: int,
    frequencies: Tensor,
    device: torch.device,
) -> EntryPlan:
    """Plans the windows that end in the new tokens; with overlap also the ones before them."""
    overlap = kind == "csa"
    had_B, has_B = lengths // ratio, (lengths + new_B) // ratio
    helper_B = ((had_B > 0) & (has_B > had_B) & overlap).astype(int)
    # Tokens that are pooled again, or not yet: from the start of the first window that is pooled.
    old_B = lengths - np.maximum(had_B - overlap, 0) * ratio
    tail, _ = _ring_plan(lengths, new_B, old_B, tail_size(kind, ratio), device)
    assembled_B = np.cumsum(old_B + new_B) - (old_B + new_B)

    pooled_B = has_B - had_B + helper_B
    sequence, index = _within(pooled_B)
    is_helper = (index == 0) & (helper_B[sequence] > 0)
    entry = (had_B - helper_B)[sequence] + index
    first = assembled_B[sequence] + entry * ratio - (lengths - old_B)[sequence]
    windows = CompressionWindows(
        on_device(first, device),
        on_device((entry > 0) & ~is_helper, device),
        rotation(on_device(entry * ratio, device), frequencies),
    )
    new = np.flatnonzero(~is_helper)
    slots = (sequence * capacity + entry)[new]
    return EntryPlan(
        tail,
        windows,
        len(new) > 0,
        on_device(new, device),
        on_device(slots, device),
        np.where(new_B > 0, has_B, 0),
        capacity,
    )


def _within(count_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns sequence and index of `count_B` consecutive items of each sequence."""
    sequence = np.repeat(np.arange(len(count_B)), count_B)
    return sequence, np.arange(count_B.sum()) - (np.cumsum(count_B) - count_B)[sequence]
