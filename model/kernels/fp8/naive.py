"""Reference FP8 matmuls (V3 §3.3): a search in the table of E4M3 values rounds every number.

T tokens; X and F a weight's inputs and outputs; R rows and C columns of any matrix.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

E4M3 = torch.tensor(
    [
        fraction / 8 * 2.0**-6 if power == 0 else (1 + fraction / 8) * 2.0 ** (power - 7)
        for power in range(16)
        for fraction in range(8)
        if (power, fraction) != (15, 7)  # NaN
    ],
    dtype=torch.float64,
)
"""Every magnitude of E4M3 in ascending order: 4 bits of exponent, 3 of fraction."""

Operands = tuple[Tensor, Tensor]
"""The two matrices of a matmul."""


def naive_round_e4m3(x: Tensor) -> Tensor:
    """Rounds to the nearest number of E4M3, ties to the even fraction; |x| <= 448, float64."""
    table = E4M3.to(x.device)
    above = torch.searchsorted(table, x.abs()).clamp(1, len(table) - 1)
    to_lower, to_upper = x.abs() - table[above - 1], table[above] - x.abs()
    # Of two neighbours the one at an even index has an even fraction.
    lower = (to_lower < to_upper) | ((to_lower == to_upper) & (above % 2 == 1))
    return torch.where(lower, table[above - 1], table[above]).copysign(x)


def naive_quantise_dequantise(x_RC: Tensor, rows: int, columns: int) -> Tensor:
    """Quantises tiles of ``rows`` x ``columns`` and returns them dequantised, float64.

    A tile has the smallest scale with which nothing overflows.
    """
    out = x_RC.double().clone()
    for top, bottom in pairwise([*range(0, len(out), rows), len(out)]):
        for left, right in pairwise([*range(0, out.shape[1], columns), out.shape[1]]):
            tile, exponent = out[top:bottom, left:right], -117
            while tile.abs().max() > 448 * 2.0**exponent:
                exponent += 1
            tile.copy_(naive_round_e4m3(tile / 2.0**exponent) * 2.0**exponent)
    return out


def naive_operands(
    x_TX: Tensor, weight_FX: Tensor, grad_TF: Tensor
) -> tuple[Operands, Operands, Operands]:
    """Returns the quantised operands of y = x wᵀ, of dx = dy w and of dw = dyᵀ x, float64."""
    weight = naive_quantise_dequantise(weight_FX, 128, 128)
    return (
        (naive_quantise_dequantise(x_TX, 1, 128), weight.t()),
        (naive_quantise_dequantise(grad_TF, 1, 128), weight),
        (naive_quantise_dequantise(grad_TF, 128, 1).t(), naive_quantise_dequantise(x_TX, 128, 1)),
    )
