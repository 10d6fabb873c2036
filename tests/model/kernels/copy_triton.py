"""A copy of rows, right or with a fault that needs many rows to show."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_row(x, out, BITS: tl.constexpr, SHIFT: tl.constexpr, DIM: tl.constexpr):
    """Copies a row; its offset has BITS bits, and what is written lies SHIFT elements further."""
    row = tl.program_id(0)
    if BITS == 64:
        row = row.to(tl.int64)
    at = row * DIM + tl.arange(0, DIM)
    tl.store(out + at + SHIFT, tl.load(x + at))
