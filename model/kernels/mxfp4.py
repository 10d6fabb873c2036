"""MXFP4: E2M1 numbers in blocks of 32 with a power-of-two scale (OCP MX 1.0).

Used for the routed experts and the indexer's queries and keys (report §3.4). R rows; C columns;
blocks run along the last dimension. All functions work on any device. Apart from the
rounding to E2M1 (in `to_fp8` to E4M3) they are exact: fp32 and bf16 hold the 16 values of E2M1 and
powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.block_sizes import FP8_BLOCK, MXFP4_BLOCK

LARGEST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIN_EXPONENT = -126
"""Exponent of the smallest scale, which blocks of zeros also get."""
_PART = 1 << 24
"""Elements rounded at a time."""
_EXPONENT_BIAS = 127
_NOT_A_NUMBER = 255  # of float8_e8m0fnu

FP8_SPAN = 14
"""Largest ratio, as an exponent of two, between the scales inside a block of 128 × 128 for which
MXFP4 fits into FP8 without loss: E4M3 holds 6 · 2^6 and 0.5 · 2^-8 exactly."""


class Packed(NamedTuple):
    """A quantised tensor as the official checkpoints hold it.

    Attributes:
        codes: int8 [..., C/2], two numbers per byte, the one with the even index in the low bits.
        scales: float8_e8m0fnu [..., C/32].
    """

    codes: Tensor
    scales: Tensor


def quantise(x: Tensor) -> Packed:
    """Rounds [..., C] to MXFP4; C must be a multiple of 32.

    A block's scale is the smallest power of two with which its largest magnitude is at most 6, so
    nothing saturates; numbers go to the nearest, ties to the even code. A block with a NaN or an
    infinity becomes NaN.
    """
    exponents = _exponents(x)
    rounded = _round_e2m1(_blocks(x).float() * power_of_two(-exponents)[..., None]).flatten(-2)
    magnitudes = torch.tensor(_MAGNITUDES, device=x.device)
    code = torch.searchsorted(magnitudes, rounded.abs().nan_to_num_().contiguous())
    code = (code + 8 * torch.signbit(rounded)).to(torch.uint8)
    codes = (code[..., 0::2] | code[..., 1::2] << 4).view(torch.int8)
    finite = _blocks(x).isfinite().all(dim=-1)
    scales = (exponents + _EXPONENT_BIAS).masked_fill_(~finite, _NOT_A_NUMBER)
    return Packed(codes, scales.to(torch.uint8).view(torch.float8_e8m0fnu))


def dequantise(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the numbers of a quantised tensor, [..., C] in `dtype`, fp32 or bf16."""
    signed = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
    pairs = torch.tensor([(low, high) for high in signed for low in signed])
    codes = packed.codes.view(torch.uint8)
    values = pairs.to(codes.device).index_select(0, codes.flatten().int())
    values = values.view(*codes.shape[:-1], -1)
    scales = packed.scales.float()[..., None]
    return (_blocks(values) * scales).flatten(-2).to(dtype)


def quantise_dequantise(x: Tensor) -> Tensor:
    """Returns `x` [..., C] after `quantise` and back, in its own dtype and without a gradient."""
    result = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    rows = max(_PART // x.shape[-1], 1)
    flat = x.detach().reshape(-1, x.shape[-1])
    parts = zip(flat.split(rows), result.view(flat.shape).split(rows), strict=True)
    for part, out in parts:  # so that intermediate tensors are small
        exponents = _exponents(part)
        scales, down = (power_of_two(e)[..., None] for e in (exponents, -exponents))
        numbers = _round_e2m1(_blocks(part).float() * down)
        _blocks(out).copy_(numbers.mul_(scales))
    return result


def naive_quantise_dequantise(x: Tensor) -> Tensor:
    """Computes `quantise_dequantise` by a search over all magnitudes, for comparison."""
    blocks = _blocks(x).double()
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.ceil(torch.log2(largest / LARGEST)).clamp(min=_MIN_EXPONENT)
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float64, device=x.device)
    distance = (blocks.abs() / torch.exp2(exponent))[..., None] - magnitudes
    odd = torch.arange(len(magnitudes), device=x.device) % 2
    code = (distance.abs() + 1e-12 * odd).argmin(-1)  # of two equally near the even one
    return (magnitudes[code] * torch.exp2(exponent)).copysign(blocks).flatten(-2).to(x.dtype)


def fake_quantise(x: Tensor) -> Tensor:
    """Applies `quantise_dequantise` in forward only: the gradient passes unchanged."""
    return straight_through(x, quantise_dequantise(x))


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Returns a view of `values`; its gradient passes unchanged to `x` of the same shape."""
    return _StraightThrough.apply(x, values)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fits_fp8(packed: Packed) -> Tensor:
    """Returns which blocks of 128 × 128 of [R, C] numbers FP8 holds without loss (report §3.4).

    Returns:
        bool [ceil(R/128), ceil(C/128)]: the scales inside differ by 2^14 at most. Blocks of zeros
        fit any scale.
    """
    exponents = packed.scales.view(torch.uint8).int()
    zero = _zero_blocks(packed)
    # 255 is above every exponent, so zero blocks do not affect the minimum
    lowest = _tiles(exponents.masked_fill(zero, _NOT_A_NUMBER)).amin(dim=(1, 3))
    highest = _tiles(exponents.masked_fill(zero, 0)).amax(dim=(1, 3))
    return highest - lowest <= FP8_SPAN


def _zero_blocks(packed: Packed) -> Tensor:
    """Returns which blocks hold nothing but zeros, bool in the shape of the scales."""
    magnitudes = packed.codes.view(torch.uint8) & 0x77
    return (magnitudes == 0).unflatten(-1, (-1, MXFP4_BLOCK // 2)).all(-1)


def to_fp8(packed: Packed) -> tuple[Tensor, Tensor]:
    """Converts to FP8 (E4M3) with one scale per 128 × 128 block, the format of FP8 kernels.

    Lossless where `fits_fp8`; elsewhere the smallest numbers are rounded.

    Returns:
        float8_e4m3fn [R, C] and float8_e8m0fnu [ceil(R/128), ceil(C/128)].
    """
    rows, columns = packed.codes.shape[0], 2 * packed.codes.shape[1]
    exponents = packed.scales.view(torch.uint8).int()
    # Zeros fit any scale: theirs must not raise the common one.
    exponents = exponents.masked_fill(_zero_blocks(packed) & (exponents != _NOT_A_NUMBER), 0)
    highest = _tiles(exponents).amax(dim=(1, 3))
    common = (highest - 6).clamp_min(0)  # 6 · 2^6 = 384 is the largest 6 · 2^k up to E4M3's 448
    expanded = common.repeat_interleave(FP8_BLOCK, 0)[:rows]
    expanded = expanded.repeat_interleave(FP8_BLOCK // MXFP4_BLOCK, 1)
    expanded = expanded[:, : columns // MXFP4_BLOCK]
    ones = torch.full_like(packed.scales.view(torch.uint8), _EXPONENT_BIAS)
    plain = dequantise(Packed(packed.codes, ones.view(torch.float8_e8m0fnu)))
    numbers = _scaled(plain, exponents - expanded).to(torch.float8_e4m3fn)
    return numbers, common.to(torch.uint8).view(torch.float8_e8m0fnu)


def from_fp8(numbers: Tensor, scales: Tensor) -> Tensor:
    """Dequantises FP8 numbers [R, C] with one scale per 128 × 128 block; returns fp32 [R, C]."""
    rows, columns = numbers.shape
    expanded = scales.float().repeat_interleave(FP8_BLOCK, 0)[:rows]
    return numbers.float() * expanded.repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def _blocks(x: Tensor) -> Tensor:
    if x.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"MXFP4 needs a multiple of {MXFP4_BLOCK} columns, got {x.shape[-1]}")
    return x.unflatten(-1, (-1, MXFP4_BLOCK))


def _exponents(x: Tensor) -> Tensor:
    """Returns int32 [..., C/32]: the smallest k >= -126 with all magnitudes <= 6 · 2^k."""
    largest = _blocks(x).abs().amax(dim=-1).float()
    fraction, exponent = torch.frexp(largest)  # 6 · 2^k = 0.75 · 2^(k+3)
    return torch.where(fraction <= 0.75, exponent - 3, exponent - 2).clamp_min_(_MIN_EXPONENT)


def power_of_two(exponents: Tensor) -> Tensor:
    """Computes 2^exponent exactly, fp32; exponents are int32 between -126 and 127."""
    return ((exponents + _EXPONENT_BIAS) << 23).view(torch.float32)


def _scaled(x: Tensor, exponents: Tensor) -> Tensor:
    """Computes x · 2^exponent of its block exactly.

    In two steps, so that neither factor over- or underflows fp32.
    """
    half = exponents // 2
    blocks = torch.ldexp(torch.ldexp(_blocks(x), half[..., None]), (exponents - half)[..., None])
    return blocks.flatten(-2)


def _round_e2m1(x: Tensor) -> Tensor:
    """Rounds to the nearest number of E2M1, ties to the even code; |x| <= 6, fp32.

    E2M1 numbers in [2^e, 2^(e+1)) are spaced 2^(e-1) apart, and 0.5 apart below 2. Adding
    1.5 · 2^23 spacings in fp32 leaves no bits below one spacing, so the addition rounds to nearest,
    ties to even.
    """
    magnitude = x.abs()
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(1.0)
    shift = power.mul_(3 * 2.0**21)
    return magnitude.add_(shift).sub_(shift).copysign_(x)


def _tiles(exponents: Tensor) -> Tensor:
    """Views [R, C/32] as [R', 128, C', 4], padded by repeating the last row and column."""
    rows, columns = exponents.shape
    wide = FP8_BLOCK // MXFP4_BLOCK
    row = torch.arange(-(-rows // FP8_BLOCK) * FP8_BLOCK, device=exponents.device)
    column = torch.arange(-(-columns // wide) * wide, device=exponents.device)
    filled = exponents[row.clamp_max(rows - 1)][:, column.clamp_max(columns - 1)]
    return filled.unflatten(1, (-1, wide)).unflatten(0, (-1, FP8_BLOCK))
