"""Rotation of adjacent pairs in registers, used by the kernels of attention and of norms.

n rows; R rotary dims (ROTARY), R/2 complex numbers of a rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate_pairs(
    x,
    cos_sin,
    index,
    in_bounds,
    sign,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Rotates the last ROTARY of DIM dims of fp32 x [ROWS, BLOCK] by sign · angle.

    ``index`` [ROWS] is each row's index into ``cos_sin``, a result of `cos_sin_of`.
    """
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    pair = tl.arange(0, BLOCK // 2) - (DIM - ROTARY) // 2
    rotated = in_bounds[:, None] & ((pair >= 0) & (pair < ROTARY // 2))[None, :]
    at = cos_sin + index.to(tl.int64)[:, None] * ROTARY + 2 * pair[None, :]
    cos = tl.load(at, mask=rotated, other=1.0)
    sin = tl.load(at + 1, mask=rotated, other=0.0) * sign
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))


def cos_sin_of(rotation: Tensor) -> Tensor:
    """Returns cosine and sine of every pair of a complex rotation [n, R/2], fp32 [n, R]."""
    return torch.view_as_real(rotation).flatten(1).contiguous()
