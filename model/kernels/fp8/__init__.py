"""Matmuls in FP8 (E4M3) with a power of two as scale for every tile (docs/quantisation.md).

For a linear y = x wᵀ, x [T, X], w [F, X], each of the three matmuls quantises both operands, in
tiles of 128 elements along the dimension that it sums over (V3 §3.3; the scales are V4's ue8m0):

    forward             y  = R(x) B(w)ᵀ        R: 1 x 128, 128 channels of a token
    gradient of x       dx = R(dy) B(w)        B: 128 x 128 of a weight
    gradient of w       dw = C(dy)ᵀ C(x)       C: 128 x 1, a channel of 128 tokens

Quantisation always starts from the training-precision tensor, never from an already quantised one.
Tiles at an edge are smaller. A tile's scale is the smallest power of two with which its largest
magnitude is at most 448: nothing saturates. A tile with a NaN or an infinity becomes NaN. Quantised
numbers have four significant bits, so bf16 and fp32 hold them exactly, scale included.
``eager.py`` multiplies them in that dtype with fp32 sums: the same operands as those of an FP8
matmul and therefore the same result up to summation order, without FP8's speed.
``matmul_triton.py`` uses FP8 tensor cores.

T tokens; X and F a weight's inputs and outputs; G groups of T tokens each (`batched`); P rows,
sorted by expert, of E experts (`grouped`).
"""

from __future__ import annotations

from torch import Tensor

from model.kernels.fp8.eager import eager_batched, eager_grouped
from model.kernels.operations import EAGER, Choice


def linear(x: Tensor, weight_FX: Tensor, choice: Choice = EAGER) -> Tensor:
    """Multiplies [.., X] by the transposed weight, [.., F]; all dims but the last are tokens."""
    y_1TF = batched(x.reshape(1, -1, x.shape[-1]), weight_FX[None], choice)
    return y_1TF.view(*x.shape[:-1], -1)


def batched(x_GTX: Tensor, weight_GFX: Tensor, choice: Choice = EAGER) -> Tensor:
    """Multiplies every group of [G, T, X] by its own transposed weight, [G, T, F]."""
    if choice.name == "triton":
        from model.kernels.fp8 import matmul_triton

        return matmul_triton.batched(x_GTX, weight_GFX, **choice.blocks)
    return eager_batched(x_GTX, weight_GFX)


def grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor, choice: Choice = EAGER) -> Tensor:
    """Multiplies the rows of each expert by that expert's transposed weight, [P, F].

    Tiles of 128 rows restart at every expert. Rows after the last end are not computed.
    """
    if choice.name == "triton":
        from model.kernels.fp8 import matmul_triton

        return matmul_triton.grouped(x_PX, weight_EFX, ends_E, **choice.blocks)
    return eager_grouped(x_PX, weight_EFX, ends_E)


def grouped_pair(
    x_PX: Tensor, first_EFX: Tensor, second_EFX: Tensor, ends_E: Tensor, choice: Choice = EAGER
) -> tuple[Tensor, Tensor]:
    """Computes `grouped` of the same rows with two stacks of matrices."""
    return grouped(x_PX, first_EFX, ends_E, choice), grouped(x_PX, second_EFX, ends_E, choice)
