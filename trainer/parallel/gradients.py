"""fp32 gradients of a rank's parameters, before they are summed over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.nn import Parameter


class Gradients:
    """fp32 gradients of all trainable parameters.

    Backward accumulates into them in place: gradients of bf16 parameters accumulate over
    microbatches in fp32. A parameter that gets no gradient on this rank has zeros, not None, so
    all ranks reduce the same tensors. Parameters without `requires_grad` have None.

    Arguments:
        parameters: of this rank.
        used_once: those that a microbatch uses in one place. Backward adds their bf16 gradient to
            the fp32 one as it is; gradients of several places are rounded only once where each is
            converted to fp32 first.
    """

    def __init__(
        self, parameters: Iterable[Parameter], used_once: Collection[Parameter] = ()
    ) -> None:
        self.parameters = list(parameters)
        added_as_they_are = {id(parameter) for parameter in used_once}
        for parameter in self.parameters:
            is_used_once = id(parameter) in added_as_they_are
            parameter.grad_dtype = None if is_used_once else torch.float32

    def zero_(self) -> None:
        """Sets every gradient to zero; the first call allocates them."""
        allocated = []
        for parameter in self.parameters:
            if not parameter.requires_grad:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                allocated.append(parameter.grad)
        if allocated:
            torch._foreach_zero_(allocated)
