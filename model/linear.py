"""The matmuls of linears and experts: in the precision of their tensors, or in FP8.

Letters: T tokens, P rows of experts, G groups of the output projection, E experts, X in_features,
Y out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import fp8


@dataclass(frozen=True)
class Matmuls:
    """Three kinds of matmuls with weights [.., Y, X].

    Attributes:
        linear: x [.., X] and weight [Y, X] to [.., Y].
        batched: x [G, T, X] and weights [G, Y, X] to [G, T, Y], each group by itself.
        grouped: x [P, X] sorted by expert, weights [E, Y, X], and int32 [E], where each expert's
            rows end; returns [P, Y]. Rows after the last end are not computed.
    """

    linear: Callable[[Tensor, Tensor], Tensor]
    batched: Callable[[Tensor, Tensor], Tensor]
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor]


def _batched(x_GTX: Tensor, weight_GYX: Tensor) -> Tensor:
    return torch.bmm(x_GTX, weight_GYX.transpose(1, 2))


def _grouped(x_PX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x_PX, weight_EYX.transpose(1, 2), offs=ends_E)


UNQUANTISED = Matmuls(F.linear, _batched, _grouped)
FP8 = Matmuls(fp8.linear, fp8.batched, fp8.grouped)
"""Used by linears and experts. The router multiplies in fp32; the output head, indexer, compressors
and hyper-connections in the precision of their weights."""


class Linear(nn.Linear):
    """A linear without bias whose matmul may be in FP8."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, matmuls: Matmuls
    ) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)
        self.matmuls = matmuls

    def forward(self, x: Tensor) -> Tensor:
        """[.., X] to [.., Y]."""
        return self.matmuls.linear(x, self.weight)
