"""What core attention's kernels share: block sizes, the arguments of a call, and device functions.

T queries; H heads; K their width (DIM); R rotary dims (ROTARY); C entries; k selected entries of a
query. In device functions ``token`` indexes [T], ``row`` indexes [T, H] as token · H + head, and
``in_bounds`` masks the rows that exist.
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
from model.kernels.norm.rotation_triton import rotate_pairs
from model.kernels.workspaces import PAIR_BYTES, PROGRAMS

LOG2E = math.log2(math.e)
NO_ENTRIES, ENTRY_RANGE, SELECTED_ENTRIES = (tl.constexpr(mode) for mode in range(3))
"""Values of MODE: which entries a query attends to in addition to its window."""
_MIN_ROWS = 16
"""Minimum number of rows of a tensor-core operand."""
FAR = tl.constexpr(2**31 - 1)
"""Start of the key range of out-of-bounds rows: larger than any key, so that minima ignore it."""


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the launches, all powers of two.

    Attributes:
        rows, keys: forward: (token, head) pairs per program and keys per step (the program loops
            over keys).
        dq_rows, dq_keys: the same in the kernel of the queries' gradient.
        dk_rows, dk_keys: keys' gradient: rows per step and keys per program (the program loops over
            rows).
        warps: warps of a program.
        stages, dq_stages, dk_stages: stages of the software pipelines of forward and of the two
            gradients. Copies of n keys are in flight with n + 2 stages.
        programs: with fewer blocks of keys than this, their queries are divided over several
            programs whose sums are added afterwards.
        pair_bytes: size of the workspace of an ordered gradient of selected entries.
        ordered: 1 to sum it in a fixed order even where none is required: 4·k·K bytes of a
            token in memory in bf16, in place of as many of atomic additions in L2.
    """

    rows: int
    keys: int
    dq_rows: int
    dq_keys: int
    dk_rows: int
    dk_keys: int
    warps: int = 8
    stages: int = 2
    dq_stages: int = 2
    dk_stages: int = 2
    programs: int = PROGRAMS
    pair_bytes: int = PAIR_BYTES
    ordered: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Compiler options of forward and of the probability mass."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def dq_options(self) -> dict[str, int]:
        """Compiler options of the queries' gradient."""
        return {"num_warps": self.warps, "num_stages": self.dq_stages}

    @property
    def dk_options(self) -> dict[str, int]:
        """Compiler options of the gradients of keys and entries."""
        return {"num_warps": self.warps, "num_stages": self.dk_stages}


def selected_stages(stages: int) -> int:
    """Returns the stages of a loop over selected entries, in which indices are copied before rows.

    So many that rows are as far ahead as in a range with ``stages``.
    """
    return 2 * stages - 1


_BLOCKS = {
    64: Blocks(128, 64, 128, 64, 64, 64, stages=3, dq_stages=3, dk_stages=3),
    128: Blocks(128, 64, 64, 64, 64, 64),
    256: Blocks(64, 64, 64, 32, 32, 64),
    512: Blocks(64, 32, 64, 16, 16, 64, stages=4, dq_stages=3, dk_stages=3),
}


def blocks_for(head_dim: int) -> Blocks:
    """Returns the block sizes for a head width.

    Raises:
        ValueError: no sizes are known for this width.
    """
    if head_dim not in _BLOCKS:
        raise ValueError(f"head_dim is {head_dim}; Triton attention supports {sorted(_BLOCKS)}")
    return _BLOCKS[head_dim]


@triton.jit
def load_queries(
    q,
    cos_sin,
    row,
    token,
    in_bounds,
    eps,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Loads queries: fp32 [ROWS, DIM] after their norm and rotation, and 1 / rms [ROWS]."""
    dim = tl.arange(0, DIM)
    at = row.to(tl.int64)[:, None] * DIM + dim[None, :]
    x = tl.load(q + at, mask=in_bounds[:, None], other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
    return rotate_pairs(
        x * rstd[:, None], cos_sin, token, in_bounds, 1.0, ROWS, DIM, DIM, ROTARY
    ), rstd


@triton.jit
def tile(keys, index, valid, DIM: tl.constexpr):
    """Loads keys [n, DIM] by index [n]; zeros where not valid."""
    at = index.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(keys + at, mask=valid[:, None], other=0.0)


@triton.jit
def range_tile(keys, n, low, high, end, DIM: tl.constexpr):
    """Loads keys n [BLOCK_N] that are below ``end``; returns them and which of them a row sees."""
    visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
    return tile(keys, n, n < end, DIM), visible


@triton.jit
def selected_tile(entries, selected, token, column, stop, num_selected, DIM: tl.constexpr):
    """Loads one token's selected entries in these columns [BLOCK_N]: indices and rows.

    Both are zero from column ``stop`` on. The masks depend on columns alone, so that the copies of
    later rows can start before earlier indices are used.
    """
    valid = column < stop
    at = token.to(tl.int64) * num_selected + column
    entry = tl.maximum(tl.load(selected + at, mask=valid, other=0), 0)
    return entry, tile(entries, entry, valid, DIM)


@triton.jit
def transposed_dot(a, b, always):
    """Computes a · bᵀ, whose result is an operand of a second matmul.

    Triton divides the first of two chained matmuls over rows alone. With up to 64 rows, 16 a warp,
    four of eight warps would compute what the other four do. It does not follow a value out of a
    branch, so there the matmul is in one that is ``always`` taken.
    """
    if a.shape[0] <= 64:
        if always:
            product = tl.dot(a, tl.trans(b), input_precision="ieee")
        else:
            # A constant would be laid out like p, and all of the softmax with it, twice.
            product = tl.dot(a, tl.trans(b), input_precision="ieee") * 0.0
    else:
        product = tl.dot(a, tl.trans(b), input_precision="ieee")
    return product


@triton.jit
def rows_of_program(tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns token, head and row indices of this program and their in-bounds mask.

    A program handles BLOCK_T tokens times BLOCK_H heads; the first programs get the last tokens.
    """
    head_blocks = tl.cdiv(heads, BLOCK_H)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.arange(0, BLOCK_T * BLOCK_H)
    token = program // head_blocks * BLOCK_T + index // BLOCK_H
    head = program % head_blocks * BLOCK_H + index % BLOCK_H
    in_bounds = (token < tokens) & (head < heads)
    return token, head, token * heads + head, in_bounds


@triton.jit
def bounds(low, high, token, in_bounds):
    """Returns each row's range of keys, and the smallest range that contains all of them."""
    first = tl.load(low + token, mask=in_bounds, other=FAR)
    end = tl.load(high + token, mask=in_bounds, other=0)
    return first, end, tl.min(first, 0), tl.max(end, 0)


class Call:
    """Arguments shared by the kernels of one call: ranges as int32, sizes, and MODE.

    `entry_end` is that of the forward, which backward does not compute again.
    """

    def __init__(
        self,
        q_THK: Tensor,
        entries_CK: Tensor | None,
        ranges: AttentionRanges,
        selected_Tk: Tensor | None,
        blocks: Blocks,
        entry_end: Tensor | None = None,
    ) -> None:
        self.tokens, self.heads, self.dim = q_THK.shape
        self.blocks = blocks
        self.softmax_scale = self.dim**-0.5
        self.scale_log2 = self.softmax_scale * LOG2E
        self.ranges = ranges
        self.key_start, self.key_end = ranges.int32_keys
        self.selected, self.num_selected, self.mode = None, 0, NO_ENTRIES.value
        self.entry_start = self.entry_end = self.key_start
        if entries_CK is None:
            return
        self.entry_start, self.entry_end = ranges.int32_entries
        self.visible_start, self.visible_end = self.entry_start, self.entry_end
        self.mode = ENTRY_RANGE.value
        if selected_Tk is not None:
            self.mode, self.num_selected = SELECTED_ENTRIES.value, selected_Tk.shape[1]
            self.selected = selected_Tk.int().contiguous()
            # In this mode entry_end is the number of selected entries, which come first.
            if entry_end is None:
                entry_end = (self.selected >= 0).sum(1, dtype=torch.int32)
            self.entry_end = entry_end

    @property
    def visible(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ranges of keys and of entries, in the order of the kernels' arguments."""
        return self.key_start, self.key_end, self.entry_start, self.entry_end

    def rows(self, max_rows: int) -> tuple[int, int]:
        """Returns tokens and heads of a program of up to ``max_rows`` rows.

        Where entries are selected, a program has one token.
        """
        heads = min(triton.next_power_of_2(self.heads), max_rows)
        if self.mode == SELECTED_ENTRIES.value:
            return 1, min(max(heads, _MIN_ROWS), max_rows)
        return max_rows // heads, heads

    def grid(self, block_t: int, block_h: int) -> tuple[int]:
        return (triton.cdiv(self.tokens, block_t) * triton.cdiv(self.heads, block_h),)


def check(q_THK: Tensor) -> None:
    """Raises UnsupportedError if Triton cannot handle these queries.

    Row indices (token, head), two for each in backward, have 32 bits; all offsets have 64.
    """
    tokens, heads, dim = q_THK.shape
    backend.attention(q_THK.device, q_THK.dtype, dim)
    if tokens * heads >= 1 << 30:
        raise backend.UnsupportedError(
            f"attention: {tokens} tokens of {heads} heads in one call; Triton supports up to 2^30"
        )
