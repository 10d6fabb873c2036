"""Shared parts of core attention's kernels: sizes of launches, a call's ranges, parts of programs.

T queries; H heads; K their width (DIM); R rotated dims (ROTARY); k selected entries. In the parts
``token`` and ``row`` index [T] and [T, H], and ``live`` masks what is outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.attention.ranges import AttentionRanges
from model.kernels.norm.rotation_triton import turned

LOG2E = math.log2(math.e)
NO_ENTRIES, ENTRY_RANGE, SELECTED_ENTRIES = range(3)
_MIN_ROWS = 16
"""The tensor cores take no fewer."""
FAR = tl.constexpr(2**31 - 1)
"""The first key of a row that is outside."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of the launches, all powers of two.

    Attributes:
        rows, keys: pairs (token, head) of a program and keys of a step, where rows stay.
        grad_rows, grad_keys: the same in the kernel of the queries' gradient.
        key_rows, key_keys: in the kernels of the keys' gradient, where keys stay.
        programs: with fewer blocks of keys than this, their queries are divided over several
            programs whose sums are added afterwards.
        pair_bytes: workspace of a deterministic gradient of selected entries.
    """

    rows: int
    keys: int
    grad_rows: int
    grad_keys: int
    key_rows: int
    key_keys: int
    warps: int = 8
    stages: int = 2
    programs: int = 528
    pair_bytes: int = 1 << 30

    @property
    def options(self) -> dict[str, int]:
        """Compiler options that go with these sizes."""
        return {"num_warps": self.warps, "num_stages": self.stages}


_BLOCKS = {
    64: Blocks(128, 64, 128, 64, 64, 64, warps=8, stages=3),
    128: Blocks(128, 64, 64, 64, 64, 64, warps=8, stages=2),
    256: Blocks(64, 64, 64, 32, 32, 64, warps=8, stages=2),
    512: Blocks(64, 64, 64, 32, 32, 64, warps=8, stages=2),
}


def blocks_for(head_dim: int) -> Blocks:
    """Returns the sizes for a head width.

    Raises:
        ValueError: no sizes are known for this width.
    """
    if head_dim not in _BLOCKS:
        raise ValueError(f"head_dim is {head_dim}; Triton attention knows {sorted(_BLOCKS)}")
    return _BLOCKS[head_dim]


@triton.jit
def ready_queries(
    q,
    rotation,
    row,
    token,
    live,
    eps,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Queries [ROWS, DIM] in fp32 after their norm and rotation, and 1 / rms [ROWS]."""
    dim = tl.arange(0, DIM)
    at = row.to(tl.int64)[:, None] * DIM + dim[None, :]
    x = tl.load(q + at, mask=live[:, None], other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
    return turned(x * rstd[:, None], rotation, token, live, 1.0, ROWS, DIM, DIM, ROTARY), rstd


@triton.jit
def tile(keys, index, valid, DIM: tl.constexpr):
    """Keys [n, DIM] by index [n]; zeros where not valid."""
    at = index.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(keys + at, mask=valid[:, None], other=0.0)


@triton.jit
def range_tile(keys, n, low, high, end, DIM: tl.constexpr):
    """Keys number n [BLOCK_N] before ``end``, and which of them each row sees."""
    visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
    return tile(keys, n, n < end, DIM), visible


@triton.jit
def selected_tile(entries, selected, token, place, num_selected, DIM: tl.constexpr):
    """The entries at ``place`` [BLOCK_N] of one token's list; where there is none, -1 and zeros."""
    entry = tl.load(
        selected + token.to(tl.int64) * num_selected + place, mask=place < num_selected, other=-1
    )
    return entry, tile(entries, entry, entry >= 0, DIM)


@triton.jit
def rows_of_program(tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """token, head, row, live of BLOCK_T tokens by BLOCK_H heads; the last tokens come first."""
    head_blocks = tl.cdiv(heads, BLOCK_H)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = tl.arange(0, BLOCK_T * BLOCK_H)
    token = program // head_blocks * BLOCK_T + place // BLOCK_H
    head = program % head_blocks * BLOCK_H + place % BLOCK_H
    live = (token < tokens) & (head < heads)
    return token, head, token * heads + head, live


@triton.jit
def bounds(low, high, token, live):
    """Each row's range of keys, and the range of all rows together."""
    first = tl.load(low + token, mask=live, other=FAR)
    end = tl.load(high + token, mask=live, other=0)
    return first, end, tl.min(first, 0), tl.max(end, 0)


class Call:
    """Arguments of every kernel of one call: ranges as int32, sizes, and how entries are read."""

    def __init__(
        self,
        q_THK: Tensor,
        entries_CK: Tensor | None,
        ranges: AttentionRanges,
        selected_Tk: Tensor | None,
        blocks: Blocks,
    ) -> None:
        self.tokens, self.heads, self.dim = q_THK.shape
        self.blocks = blocks
        self.root = self.dim**-0.5
        self.scale = self.root * LOG2E
        self.key_start = ranges.window_start_T.int()
        self.key_end = _own_key(ranges.segments, self.tokens, q_THK.device) + 1
        self.selected, self.num_selected, self.mode = None, 0, NO_ENTRIES
        self.entry_start = self.entry_end = self.key_start
        if entries_CK is None:
            return
        assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
        self.entry_start, self.entry_end = ranges.entry_start_T.int(), ranges.entry_end_T.int()
        self.mode = ENTRY_RANGE
        if selected_Tk is not None:
            self.mode, self.num_selected = SELECTED_ENTRIES, selected_Tk.shape[1]
            self.selected = selected_Tk.int().contiguous()
            # A list is read up to its last entry.
            place = torch.arange(1, self.num_selected + 1, device=q_THK.device, dtype=torch.int32)
            self.entry_end = (place * (self.selected >= 0)).amax(1)

    @property
    def visible(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ranges of keys and of entries, as kernels take them."""
        return self.key_start, self.key_end, self.entry_start, self.entry_end

    def rows(self, max_rows: int) -> tuple[int, int]:
        """Returns tokens and heads of a program of up to ``max_rows`` rows; one token of a list."""
        heads = min(triton.next_power_of_2(self.heads), max_rows)
        if self.mode == SELECTED_ENTRIES:
            return 1, min(max(heads, _MIN_ROWS), max_rows)
        return max_rows // heads, heads

    def grid(self, block_t: int, block_h: int) -> tuple[int]:
        return (triton.cdiv(self.tokens, block_t) * triton.cdiv(self.heads, block_h),)


def _own_key(
    segments: tuple[tuple[int, int, int], ...], tokens: int, device: torch.device
) -> Tensor:
    """Returns the number of each query's own key, int32 [T]."""
    key_T = torch.arange(tokens, dtype=torch.int32, device=device)
    for start, stop, shift in segments:
        key_T[start:stop] += shift
    return key_T


def check(q_THK: Tensor) -> None:
    """Raises UnsupportedError where Triton cannot take these queries.

    Rows (token, head), two for each in backward, are numbered in 32 bits; all offsets in 64.
    """
    tokens, heads, dim = q_THK.shape
    backend.attention(q_THK.device, q_THK.dtype, dim, required=True)
    if tokens * heads >= 1 << 30:
        raise backend.UnsupportedError(
            f"attention: {tokens} tokens of {heads} heads in one call; Triton numbers up to 2^30"
        )
