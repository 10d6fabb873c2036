"""RMS normalisation as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.kernels.norm import rms_norm
from model.kernels.operations import ALL_EAGER, Kernels


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dim; the weight is kept in fp32."""

    def __init__(self, dim: int, eps: float, kernels: Kernels = ALL_EAGER) -> None:
        super().__init__()
        self.choice = kernels.norms
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.eps = eps

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns x [..., dim] normalised, and rotated if ``rotation`` is given.

        Computed in fp32 and rounded once, to ``dtype`` (x's by default).
        """
        return rms_norm(x, self.weight, self.eps, rotation, dtype, self.choice)
