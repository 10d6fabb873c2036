"""How linears and experts multiply: in the precision of their tensors, or in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import fp8


@dataclass(frozen=True)
class Products:
    """Three kinds of products with weights [.., F, X].

    Attributes:
        linear: [.., X] and [F, X] to [.., F].
        batched: [G, T, X] and [G, F, X] to [G, T, F], each group by itself.
        grouped: rows [P, X] sorted by group, [E, F, X] and int32 [E], where each group's rows end;
            to [P, F]. Rows behind the last end are not computed.
    """

    linear: Callable[[Tensor, Tensor], Tensor]
    batched: Callable[[Tensor, Tensor], Tensor]
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor]


def _batched(x_GTX: Tensor, weight_GFX: Tensor) -> Tensor:
    return torch.bmm(x_GTX, weight_GFX.transpose(1, 2))


def _grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x_PX, weight_EFX.transpose(1, 2), offs=ends_E)


PLAIN = Products(F.linear, _batched, _grouped)
FP8 = Products(fp8.linear, fp8.batched, fp8.grouped)


class Linear(nn.Linear):
    """A linear whose product may be in eight bits."""

    products: Products = PLAIN

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[.., X] to [.., F]."""
        return self.products.linear(x, self.weight)


def use_fp8(model: nn.Module) -> None:
    """Let the model's linears and experts multiply in FP8.

    Not so output head, router, indexer, compressors and hyper-connections, whose products stay in
    their own precision; the embedding and attention itself have no such weights.
    """
    for module in model.modules():
        if hasattr(module, "products"):
            module.products = FP8  # type: ignore[assignment]
