"""Matmuls of operands quantised to FP8 but multiplied in their own dtype, on any device.

T tokens; X and F a weight's inputs and outputs; G groups; E experts; P rows; R rows and C columns
of any matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.block_sizes import FP8_BLOCK as BLOCK
from model.kernels.mxfp4 import power_of_two

_MIN_EXPONENT = -117
"""Exponent of the smallest scale, also used for all-zero tiles: E4M3's smallest subnormal 2^-9
times 2^-117 is 2^-126, fp32's smallest normal number."""


def eager_batched(x_GTX: Tensor, weight_GFX: Tensor) -> Tensor:
    """Computes `model.kernels.fp8.batched`."""
    return _Batched.apply(x_GTX, weight_GFX)


def eager_grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor) -> Tensor:
    """Computes `model.kernels.fp8.grouped`."""
    return _Grouped.apply(x_PX, weight_EFX, ends_E)


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(
            quantise_dequantise(x, 1, BLOCK),
            quantise_dequantise(weight, BLOCK, BLOCK).transpose(1, 2),
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(
                quantise_dequantise(grad, 1, BLOCK), quantise_dequantise(weight, BLOCK, BLOCK)
            )
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(
                quantise_dequantise(grad, BLOCK, 1).transpose(1, 2),
                quantise_dequantise(x, BLOCK, 1),
            )
        return grad_x, grad_weight


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        quantised_weight = quantise_dequantise(weight, BLOCK, BLOCK).transpose(1, 2)
        return F.grouped_mm(quantise_dequantise(x, 1, BLOCK), quantised_weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(
                quantise_dequantise(grad, 1, BLOCK),
                quantise_dequantise(weight, BLOCK, BLOCK),
                offs=ends,
            )
        if ctx.needs_input_grad[1]:
            tile_P = tiles_of_groups(ends, len(x))
            grad, x = (quantise_dequantise_by_tile(rows, tile_P, len(ends)) for rows in (grad, x))
            grad_weight = F.grouped_mm(grad.transpose(0, 1), x, offs=ends)
        return grad_x, grad_weight, None


def quantise_dequantise(x: Tensor, rows: int, columns: int) -> Tensor:
    """Quantises tiles of ``rows`` x ``columns`` of [.., R, C]; returns them in x's dtype.

    The dtype is fp32 or bf16.
    """
    down, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    filled = F.pad(x, (0, right, 0, down)) if down or right else x
    tiles = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    largest = tiles.abs().amax(dim=(-3, -1), keepdim=True)
    out = round_e4m3(tiles, largest).flatten(-4, -3).flatten(-2)
    return out[..., : x.shape[-2], : x.shape[-1]] if down or right else out


def quantise_dequantise_by_tile(x_PC: Tensor, tile_P: Tensor, groups: int) -> Tensor:
    """Quantises each channel in tiles of rows given by `tiles_of_groups`; in x's dtype."""
    index_PC = tile_P[:, None].expand_as(x_PC)
    max_tiles = len(x_PC) // BLOCK + groups + 1
    largest = x_PC.new_zeros(max_tiles, x_PC.shape[1])
    largest = largest.scatter_reduce(0, index_PC, x_PC.abs(), "amax")
    return round_e4m3(x_PC, largest.gather(0, index_PC))


def tiles_of_groups(ends_E: Tensor, rows: int) -> Tensor:
    """Returns the tile index of each row, [P]; a tile is up to 128 rows of one group.

    No device sync. Rows after the last end have separate tiles.
    """
    end_E = ends_E.long()
    start_E = F.pad(end_E, (1, 0))
    tiles_E = (start_E.diff() + BLOCK - 1) // BLOCK
    before_E = F.pad(tiles_E.cumsum(0), (1, 0))
    row_P = torch.arange(rows, device=ends_E.device)
    group_P = torch.searchsorted(end_E, row_P, right=True)
    return before_E[group_P] + (row_P - start_E[group_P]) // BLOCK


def quantise_blocks(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight in tiles of 128 x 128, as released weights are stored.

    Returns:
        float8_e4m3fn [R, C] and float8_e8m0fnu [ceil(R/128), ceil(C/128)], which
        `model.kernels.mxfp4.from_fp8` multiplies to `quantise_dequantise(x, 128, 128)`. Tiles that
        are not finite have the scale NaN.
    """
    rows, columns = x_RC.shape
    filled = F.pad(x_RC.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = filled.unflatten(-1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = tiles.abs().amax(dim=(1, 3))
    exponents = e4m3_exponents(largest)
    codes = (tiles * power_of_two(-exponents)[:, None, :, None]).to(torch.float8_e4m3fn)
    scales = power_of_two(exponents).masked_fill_(~largest.isfinite(), torch.nan)
    codes = codes.flatten(0, 1).flatten(1)[:rows, :columns].contiguous()
    return codes, scales.to(torch.float8_e8m0fnu)


def e4m3_exponents(largest: Tensor) -> Tensor:
    """Returns int32: the smallest k >= -117 with ``largest`` <= 448 · 2^k."""
    fraction, exponent = torch.frexp(largest.float())  # 448 · 2^k = 0.875 · 2^(k+9)
    exponent = torch.where(fraction <= 0.875, exponent - 9, exponent - 8)
    return exponent.clamp_min_(_MIN_EXPONENT)


def round_e4m3(x: Tensor, largest: Tensor) -> Tensor:
    """Rounds to E4M3 with the scale implied by ``largest``, ties to even, and rescales."""
    exponent = e4m3_exponents(largest)
    scale = power_of_two(exponent).masked_fill(~largest.isfinite(), torch.nan)
    numbers = (x.float() * power_of_two(-exponent)).to(torch.float8_e4m3fn)
    return (numbers.float() * scale).to(x.dtype)
