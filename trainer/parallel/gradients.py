"""Gradients of a rank's part of the model before they are summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter


class Gradients:
    """fp32 gradients of all parameters that are trained.

    Backward adds to them in place, so bf16 parameters gather their microbatches in fp32, and a
    parameter that got no gradient on one rank has zeros there rather than None. Parameters without
    `requires_grad` have None.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.grad_dtype = torch.float32

    def zero_(self) -> None:
        """Set every gradient to zero; memory is taken the first time."""
        there = []
        for parameter in self.parameters:
            if not parameter.requires_grad:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                there.append(parameter.grad)
        if there:
            torch._foreach_zero_(there)
