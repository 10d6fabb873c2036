"""The global gradient norm, and clipping by it (to 1.0 in V3). Nothing waits for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all `.grad` together: 0-dim fp32, on their device.

    Summed in fp64 whatever their precision: fp32 loses a few parts in a thousand on a matrix of
    10M elements on CPU, where sums are sequential. Parameters without a gradient do not count. If
    a gradient is not finite, neither is the norm.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        norms = torch._foreach_norm(gradients, dtype=torch.float64)
        return torch.linalg.vector_norm(torch.stack(norms)).float()
    return torch.zeros((), device=parameters[0].device if parameters else None)


def clip_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales every `.grad` in place so that a global norm of `norm` becomes at most `max_norm`.

    If the norm is not finite, clipping does not make gradients finite: check it before the update.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:  # torch.nn.utils has the same, but for some kinds of tensors one by one
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
