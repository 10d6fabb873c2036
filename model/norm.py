"""RMS normalisation as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.pointwise import EAGER_OR_TRITON, PointwiseOps


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dim; the weight is kept in fp32."""

    def __init__(self, dim: int, eps: float, pointwise: PointwiseOps = EAGER_OR_TRITON) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.eps = eps

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns x [..., dim] normalised, and rotated if ``rotation`` is given.

        Computed in fp32 and rounded once, to ``dtype`` (x's by default).
        """
        return self.pointwise.rms_norm(x, self.weight, self.eps, rotation, dtype)
