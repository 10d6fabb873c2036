"""Matmuls of consecutive groups of rows, each with a matrix of its own: those of routed experts.

torch's kernel for all groups needs a GPU of compute capability 9.x or 10.x; on others it reads the
ends of the groups from the device, and multiplies group by group. ``matmul_triton.py`` reads
nothing on any GPU.

P rows; E groups; X and Y the inputs and outputs of a matrix.
"""

from __future__ import annotations

from torch import Tensor

from model.kernels.grouped_mm.eager import (
    eager_grouped_mm,
    eager_grouped_mm_pair,
    row_alignment,
)
from model.kernels.operations import EAGER, Choice

__all__ = ["grouped_mm", "grouped_mm_pair", "row_alignment"]


def grouped_mm(x_PX: Tensor, weight_EYX: Tensor, ends_E: Tensor, choice: Choice = EAGER) -> Tensor:
    """Computes x · weightᵀ of each group, [P, Y].

    Args:
        ends_E: int32, where each group's rows end. Rows after the last end are not computed.
    """
    if choice.name == "triton":
        from model.kernels.grouped_mm import matmul_triton

        return matmul_triton.grouped_mm(x_PX, weight_EYX, ends_E, **choice.blocks)
    return eager_grouped_mm(x_PX, weight_EYX, ends_E)


def grouped_mm_pair(
    x_PX: Tensor,
    first_EYX: Tensor,
    second_EYX: Tensor,
    ends_E: Tensor,
    choice: Choice = EAGER,
) -> tuple[Tensor, Tensor]:
    """Computes `grouped_mm` of the same rows with two stacks of matrices."""
    if choice.name == "triton":
        first = grouped_mm(x_PX, first_EYX, ends_E, choice)
        return first, grouped_mm(x_PX, second_EYX, ends_E, choice)
    return eager_grouped_mm_pair(x_PX, first_EYX, second_EYX, ends_E)
