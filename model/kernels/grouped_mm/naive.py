"""Matmuls of groups of rows, one after the other, for comparison in any dtype.

P rows; E groups; X and Y the inputs and outputs of a matrix.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def naive_grouped_mm(x_PX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    """Computes x · weightᵀ of each group, [rows before the last end, Y]."""
    groups = enumerate(pairwise([0, *ends_E.tolist()]))
    return torch.cat([x_PX[first:end] @ weight_EYX[e].t() for e, (first, end) in groups])
