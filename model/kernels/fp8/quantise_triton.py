"""Rounding to FP8 in Triton: E4M3 codes and a power-of-two scale for every tile.

Code times scale equals `eager.quantise_dequantise` and `quantise_dequantise_by_tile` to the bit. A
program reads 128 x 128 elements once; for a gradient it writes both the row and the column
quantisation from one read. The tensor cores read FP8 only where the dimension that is summed over
is contiguous, hence these layouts:

    rows       1 x 128      [P, C'], scales [C'/128, P]: not transposed
    columns    128 x 1      [N, C, 128], scales [N, C]: N tiles of 128 rows of one group, transposed
    weights    128 x 128    [E, F, X'], scales [E, F'/128, X'/128], or transposed: [E, X, F'], ...

where ' means rounded up to a multiple of 128, padded with zeros. Bytes per element: 2 read, 1
written (2 for a gradient); at an H100's 3.35 TB/s 0.9 and 1.2 ps, not yet timed.

P rows of E experts, T rows of each where all have as many; C columns of any matrix; F and X a
weight's rows and columns; N tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.block_sizes import FP8_BLOCK as BLOCK
from model.kernels.row_tiles_triton import Tiles

_CODES = torch.float8_e4m3fn


class Codes(NamedTuple):
    """E4M3 codes, and one fp32 power-of-two scale per tile.

    The scale is NaN for tiles that contain NaN or infinity.
    """

    codes: Tensor
    scales: Tensor


def quantise(x: Tensor, tiles: Tiles, *, rows: bool, columns: bool) -> tuple[Codes, Codes]:
    """Quantises by rows and by columns of tiles, as laid out above; empty where not requested.

    Rows that belong to no group are neither read nor written.

    Args:
        x: [P, C], or [E, T, C] with T rows per group; not copied if its last dimension is
            contiguous.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    height, width, stride = x.shape[:-1].numel(), x.shape[-1], x.stride(-2)
    shift = x.stride(0) - x.shape[1] * stride if x.dim() == 3 else 0
    blocks, count = triton.cdiv(width, BLOCK), len(tiles.first)
    by_row, by_column = (
        Codes(
            x.new_empty(shape if wanted else 0, dtype=_CODES),
            x.new_empty(of_scales if wanted else 0, dtype=torch.float32),
        )
        for wanted, shape, of_scales in (
            (rows, (height, blocks * BLOCK), (blocks, height)),
            (columns, (count, width, BLOCK), (count, width)),
        )
    )
    _quantise[(count, blocks)](
        x,
        *by_row,
        *by_column,
        tiles.group,
        tiles.first,
        tiles.end,
        height,
        width,
        blocks,
        stride,
        shift,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return by_row, by_column


def quantise_weight(weight_EFX: Tensor, *, transposed: bool) -> Codes:
    """Quantises by blocks of 128 x 128 as laid out above; X is contiguous, or F if transposed."""
    weight_EFX = weight_EFX.contiguous()
    experts, height, width = weight_EFX.shape
    down, right = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK)
    lines, blocks = (width, (right, down)) if transposed else (height, (down, right))
    codes = weight_EFX.new_empty(experts, lines, blocks[1] * BLOCK, dtype=_CODES)
    scales = weight_EFX.new_empty(experts, *blocks, dtype=torch.float32)
    _quantise_weight[(experts * down, right)](
        weight_EFX,
        codes,
        scales,
        height,
        width,
        TRANSPOSED=transposed,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return Codes(codes, scales)


@triton.jit
def _magnitude(x):
    """Returns the bits of fp32 magnitudes: integers in the same order, infinity and NaN last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(largest):
    """Returns a tile's scale from the bits of its maximum, and 1 / scale, 0 if it is not finite.

    448 is 1.75 · 2^8, so that a significand above 1.75, and only such, carries into the exponent.
    The minimum scale is 2^-117, whose magnitudes up to 448 have a biased exponent of at most 18.
    """
    finite = largest < 0x7F800000
    power = tl.maximum((tl.where(finite, largest, 0) + 0x1FFFFF) >> 23, 18)
    scale = ((power - 8) << 23).to(tl.float32, bitcast=True)
    down = ((262 - power) << 23).to(tl.float32, bitcast=True)
    return tl.where(finite, scale, float("nan")), tl.where(finite, down, 0.0)


@triton.jit
def _codes(x, down):
    """Rounds x · down to E4M3, ties to even; 0 where down is 0.

    E4M3 numbers in [2^e, 2^(e+1)) are spaced 2^(e-3) apart; below 2^-6 they are spaced 2^-9. Adding
    1.5 · 2^23 spacings in fp32 leaves no bits below one spacing, so the addition rounds to nearest,
    ties to even, and the conversion itself has nothing to round.
    """
    x = tl.where(down == 0.0, 0.0, x) * down
    power = (_magnitude(x) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 0.015625) * 1572864.0
    rounded = (tl.abs(x) + shift) - shift
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    signed = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return signed.to(tl.float8e4nv)


@triton.jit
def _quantise(
    x,
    row_codes,
    row_scales,
    column_codes,
    column_scales,
    tile_group,
    tile_first,
    tile_end,
    rows,
    columns,
    blocks,
    stride,
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantises 128 columns of one tile; group g's rows lie g · ``shift`` elements further on."""
    tile, block = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first == end:
        return
    row = first + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    in_bounds, inside = row < end, column < columns
    start = tl.load(tile_group + tile).to(tl.int64) * shift
    at = start + row.to(tl.int64)[:, None] * stride + column[None, :]
    value = tl.load(x + at, mask=in_bounds[:, None] & inside[None, :], other=0.0).to(tl.float32)
    bits = _magnitude(value)
    if ROWS:
        scale, down = _scale_of(tl.max(bits, 1))
        at = row.to(tl.int64)[:, None] * (blocks * BLOCK) + column[None, :]
        tl.store(row_codes + at, _codes(value, down[:, None]), mask=in_bounds[:, None])
        tl.store(row_scales + block.to(tl.int64) * rows + row, scale, mask=in_bounds)
    if COLUMNS:
        scale, down = _scale_of(tl.max(bits, 0))
        line = tile.to(tl.int64) * columns + column
        at = line[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        codes = tl.trans(_codes(value, down[None, :]))
        tl.store(column_codes + at, codes, mask=inside[:, None])
        tl.store(column_scales + line, scale, mask=inside)


@triton.jit
def _quantise_weight(
    x, row_codes, row_scales, rows, columns, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):
    """Quantises one block of one expert's weight."""
    down_blocks, right_blocks = tl.cdiv(rows, BLOCK), tl.num_programs(1)
    expert = (tl.program_id(0) // down_blocks).to(tl.int64)
    i, j = tl.program_id(0) % down_blocks, tl.program_id(1)
    row = i * BLOCK + tl.arange(0, BLOCK)
    column = j * BLOCK + tl.arange(0, BLOCK)
    in_bounds, inside = row < rows, column < columns
    at = (expert * rows + row)[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=in_bounds[:, None] & inside[None, :], other=0.0).to(tl.float32)
    scale, down = _scale_of(tl.max(tl.max(_magnitude(value), 1), 0))
    codes = _codes(value, down)
    if TRANSPOSED:
        at = (expert * columns + column)[:, None] * (down_blocks * BLOCK) + row[None, :]
        tl.store(row_codes + at, tl.trans(codes), mask=inside[:, None])
        tl.store(row_scales + (expert * right_blocks + j) * down_blocks + i, scale)
    else:
        at = (expert * rows + row)[:, None] * (right_blocks * BLOCK) + column[None, :]
        tl.store(row_codes + at, codes, mask=in_bounds[:, None])
        tl.store(row_scales + (expert * down_blocks + i) * right_blocks + j, scale)
