"""How linears and experts multiply: in the precision of their tensors, or in FP8.

Letters: T tokens, P rows of experts, G groups, E experts, X input features, F output features.
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
    """Three kinds of matmuls with weights [.., F, X].

    Attributes:
        linear: [.., X] and [F, X] to [.., F].
        batched: [G, T, X] and [G, F, X] to [G, T, F], each group by itself.
        grouped: rows [P, X] sorted by group, [E, F, X] and int32 [E], where each group's rows end;
            to [P, F]. Rows after the last end are not computed.
    """

    linear: Callable[[Tensor, Tensor], Tensor]
    batched: Callable[[Tensor, Tensor], Tensor]
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor]


def _batched(x_GTX: Tensor, weight_GFX: Tensor) -> Tensor:
    return torch.bmm(x_GTX, weight_GFX.transpose(1, 2))


def _grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x_PX, weight_EFX.transpose(1, 2), offs=ends_E)


PLAIN = Matmuls(F.linear, _batched, _grouped)
FP8 = Matmuls(fp8.linear, fp8.batched, fp8.grouped)
"""For linears and experts. Output head, router, indexer, compressors and hyper-connections multiply
in their own precision; the embedding and attention itself have no such weights."""


class Linear(nn.Linear):
    """A linear without bias whose matmul may be in FP8."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, matmuls: Matmuls) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=dtype)
        self.matmuls = matmuls

    def forward(self, x: Tensor) -> Tensor:
        """[.., X] to [.., F]."""
        return self.matmuls.linear(x, self.weight)
