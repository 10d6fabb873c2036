"""The global gradient norm and clipping by it (V3: 1.0). Nothing here waits for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all `.grad` together, as `joint_norm`; a missing `.grad` is nothing."""
    return joint_norm(parameter.grad for parameter in parameters if parameter.grad is not None)


def clip_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale every `.grad` in place so that a global norm of `norm` becomes at most `max_norm`.

    A norm that is not finite makes the gradients not finite: check it before the update.
    """
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    scale_(gradients, norm, max_norm)


def joint_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together: a 0-dim fp32 tensor on their device.

    Summed in fp64 whatever their precision: fp32 loses a few parts in a thousand on a matrix of
    10M elements on CPU, where sums are sequential. Anything not finite gives a norm that is not.
    """
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).float() if norms else torch.zeros(())


def scale_(tensors: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply all tensors in place by min(1, max_norm / norm), as `clip_` does with `.grad`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for tensor in tensors:
        tensor.mul_(factor)
