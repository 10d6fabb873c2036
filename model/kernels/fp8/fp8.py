"""Products in FP8 (E4M3) with a power of two as scale for every tile (V3 3.3, V4's ue8m0 scales).

Of a linear y = x wᵀ with x [T, X] and w [F, X] each of the three products rounds both factors, in
tiles of 128 numbers along the dimension that it sums over:

    forward             y  = R(x) B(w)ᵀ        R: 1 x 128, 128 channels of a token
    gradient of x       dx = R(dy) B(w)        B: 128 x 128 of a weight
    gradient of w       dw = C(dy)ᵀ C(x)       C: 128 x 1, a channel of 128 tokens

What is rounded is always the number in the training precision, never one rounded before. Tiles at
an edge are smaller. A tile's scale is the least power of two with which its largest magnitude is
at most 448: nothing saturates. A tile with a NaN or an infinity becomes NaN. Rounded numbers have
four significant bits, so bf16 and fp32 hold them exactly, scale included, and the reference here
multiplies them as such, with sums in fp32: the same factors as those of an FP8 product, and so its
values up to the order of sums, but not its speed. ``fp8_triton.py`` has the tensor cores' products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import backend
from model.kernels.mxfp4 import FP8_BLOCK as BLOCK
from model.kernels.mxfp4 import power_of_two

_LEAST_EXPONENT = -117
"""Smallest scale, also that of zeros: its smallest number, 2^-9 of it, is a normal one of fp32."""


def linear(x: Tensor, weight_FX: Tensor) -> Tensor:
    """[.., X] times the transposed weight, [.., F]; all dims but the last count as tokens."""
    y_1TF = batched(x.reshape(1, -1, x.shape[-1]), weight_FX[None])
    return y_1TF.view(*x.shape[:-1], -1)


def batched(x_GTX: Tensor, weight_GFX: Tensor) -> Tensor:
    """Every group of [G, T, X] times its own transposed weight, [G, T, F]."""
    if backend.fp8(x_GTX.device, x_GTX.dtype).name == "triton":
        from model.kernels.fp8 import matmul_triton as fp8_triton

        return fp8_triton.batched(x_GTX, weight_GFX)
    return reference_batched(x_GTX, weight_GFX)


def reference_batched(x_GTX: Tensor, weight_GFX: Tensor) -> Tensor:
    """`batched` in plain PyTorch, on any device."""
    return _Batched.apply(x_GTX, weight_GFX)


def grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor) -> Tensor:
    """Rows sorted by group times their group's transposed weight, [P, F].

    Tiles of 128 tokens begin anew with every group. Rows behind the last end are not computed.
    """
    if backend.fp8(x_PX.device, x_PX.dtype).name == "triton":
        from model.kernels.fp8 import matmul_triton as fp8_triton

        return fp8_triton.grouped(x_PX, weight_EFX, ends_E)
    return reference_grouped(x_PX, weight_EFX, ends_E)


def reference_grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped` in plain PyTorch, on any device."""
    return _Grouped.apply(x_PX, weight_EFX, ends_E)


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(rounded(x, 1, BLOCK), rounded(weight, BLOCK, BLOCK).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(rounded(grad, 1, BLOCK), rounded(weight, BLOCK, BLOCK))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(rounded(grad, BLOCK, 1).transpose(1, 2), rounded(x, BLOCK, 1))
        return grad_x, grad_weight


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        rounded_weight = rounded(weight, BLOCK, BLOCK).transpose(1, 2)
        return F.grouped_mm(rounded(x, 1, BLOCK), rounded_weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(rounded(grad, 1, BLOCK), rounded(weight, BLOCK, BLOCK), offs=ends)
        if ctx.needs_input_grad[1]:
            tile_P = tiles_of_groups(ends, len(x))
            grad, x = (rounded_by_tile(rows, tile_P, len(ends)) for rows in (grad, x))
            grad_weight = F.grouped_mm(grad.transpose(0, 1), x, offs=ends)
        return grad_x, grad_weight, None


def rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """[.., R, C] with tiles of `rows` x `columns` rounded, in its own dtype, fp32 or bf16."""
    down, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    filled = F.pad(x, (0, right, 0, down)) if down or right else x
    tiles = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    largest = tiles.abs().amax(dim=(-3, -1), keepdim=True)
    out = _rounded(tiles, largest).flatten(-4, -3).flatten(-2)
    return out[..., : x.shape[-2], : x.shape[-1]] if down or right else out


def rounded_by_tile(x_PC: Tensor, tile_P: Tensor, groups: int) -> Tensor:
    """[P, C] with every channel rounded by tiles of rows, whose numbers `tiles_of_groups` gives."""
    index_PC = tile_P[:, None].expand_as(x_PC)
    most = len(x_PC) // BLOCK + groups + 1
    largest = x_PC.new_zeros(most, x_PC.shape[1])
    largest = largest.scatter_reduce(0, index_PC, x_PC.abs(), "amax")
    return _rounded(x_PC, largest.gather(0, index_PC))


def tiles_of_groups(ends_E: Tensor, rows: int) -> Tensor:
    """The number of each row's tile, [P]: up to 128 rows of one group; no wait for the device.

    Rows behind the last end have tiles of their own.
    """
    end_E = ends_E.long()
    start_E = F.pad(end_E, (1, 0))
    tiles_E = (start_E.diff() + BLOCK - 1) // BLOCK
    before_E = F.pad(tiles_E.cumsum(0), (1, 0))
    row_P = torch.arange(rows, device=ends_E.device)
    group_P = torch.searchsorted(end_E, row_P, right=True)
    return before_E[group_P] + (row_P - start_E[group_P]) // BLOCK


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    """To E4M3 numbers times the scale that goes with the largest magnitude, ties to even."""
    fraction, exponent = torch.frexp(largest.float())  # 448 · 2^k = 0.875 · 2^(k+9)
    exponent = torch.where(fraction <= 0.875, exponent - 9, exponent - 8)
    exponent = exponent.clamp_min(_LEAST_EXPONENT)
    scale = power_of_two(exponent).masked_fill(~largest.isfinite(), torch.nan)
    numbers = (x.float() * power_of_two(-exponent)).to(torch.float8_e4m3fn)
    return (numbers.float() * scale).to(x.dtype)
