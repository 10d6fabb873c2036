"""Rotation of adjacent pairs, in registers: a part of the kernels of attention and of norms.

n rows; R rotated dims (ROTARY).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def turned(
    x,
    rotation,
    place,
    live,
    sign,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Rotates the last ROTARY of DIM dims of fp32 x [ROWS, BLOCK] by sign · angle.

    ``place`` [ROWS] is each row's place in ``rotation``, whose numbers are `angles_of`.
    """
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    pair = tl.arange(0, BLOCK // 2) - (DIM - ROTARY) // 2
    turns = live[:, None] & ((pair >= 0) & (pair < ROTARY // 2))[None, :]
    at = rotation + place.to(tl.int64)[:, None] * ROTARY + 2 * pair[None, :]
    cos = tl.load(at, mask=turns, other=1.0)
    sin = tl.load(at + 1, mask=turns, other=0.0) * sign
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))


def angles_of(rotation: Tensor) -> Tensor:
    """Returns cosine and sine of every pair of a complex rotation [n, R/2], fp32 [n, R]."""
    return torch.view_as_real(rotation).flatten(1).contiguous()
