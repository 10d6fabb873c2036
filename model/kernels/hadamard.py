"""Walsh-Hadamard transform of the last dimension, which spreads outliers before rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """`x` [..., J] times the orthogonal J x J Hadamard matrix (Sylvester's), in x's dtype.

    Sums and differences of pairs in fp32, so a row's result does not depend on the other rows. It
    is its own inverse. J must be a power of two.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"a Hadamard matrix here has a power of two columns, not {size}")
    y = x.float()
    step = 1
    while step < size:
        first, second = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return (y * size**-0.5).to(x.dtype)
