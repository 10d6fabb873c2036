"""Chunks of queries that eager attention handles at a time. H heads; W the window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_CPU_PAIRS, _GPU_PAIRS = 1 << 12, 1 << 15
"""(query, head) pairs per chunk: on a CPU the logits of a chunk then stay in the cores' caches; a
GPU needs few, large launches, and a chunk with V4's largest selection still takes half a GiB."""

LOG2E = math.log2(math.e)
"""The softmax works in base 2: exp2 is cheaper than exp on CPU and GPU."""


@dataclass(frozen=True)
class Chunk:
    """Queries [start, stop), in sub-blocks (bands) of ``band`` tokens.

    A band shares one slice of W - 1 + band keys. The key of query `start` has index start + shift.
    """

    start: int
    stop: int
    band: int
    shift: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def max_pairs_of(device: torch.device) -> int:
    return _CPU_PAIRS if device.type == "cpu" else _GPU_PAIRS


def chunks_of(
    segments: tuple[tuple[int, int, int], ...], heads: int, window: int, max_pairs: int
) -> list[Chunk]:
    """Divides queries into chunks of bands.

    Each query computes W - 1 + band logits, of which at most W are unmasked; wider bands mean
    fewer, larger matmuls.
    """
    band = max(window // 4, 8)
    step = max(max_pairs // (heads * band), 1) * band
    chunks = []
    for start, stop, shift in segments:
        full = start + (stop - start) // band * band
        for first in range(start, full, step):
            chunks.append(Chunk(first, min(first + step, full), band, shift))
        if full < stop:
            chunks.append(Chunk(full, stop, stop - full, shift))
    return chunks
