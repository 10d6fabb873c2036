"""Walsh-Hadamard transform of the last dimension, which spreads outliers before rounding.

J is the width of an index head, a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Multiplies `x` [..., J] by the orthogonal J x J Hadamard matrix (Sylvester's), in x's dtype.

    Computed by sums and differences of pairs, in fp32, and not by a matmul, so a row's result does
    not depend on the other rows.
    The transform is its own inverse. J must be a power of two.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"hadamard needs a last dimension that is a power of two, got {size}")
    y = x.float()
    step = 1
    while step < size:
        first, second = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return (y * size**-0.5).to(x.dtype)


def naive_hadamard(x: Tensor) -> Tensor:
    """Multiplies `x` [..., J] by the matrix itself, for comparison in any dtype."""
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype, device=x.device)
    while len(matrix) < x.shape[-1]:
        matrix = torch.kron(matrix, two)
    return x @ matrix * x.shape[-1] ** -0.5
