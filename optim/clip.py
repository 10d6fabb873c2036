"""The global gradient norm and clipping by it (V3: 1.0). Nothing here waits for the device."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def gradient_norm(
    parameters: Iterable[Tensor],
    replicas: Sequence[int] | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Euclidean norm of all `.grad` together: a 0-dim fp32 tensor on their device.

    Where several ranks hold the model, `sum_over_ranks` sums a 0-dim tensor over all of them, and
    `replicas` says for each parameter how many of them hold this same part of it, so that every
    element counts once.

    Summed in fp64 whatever their precision: fp32 loses a few parts in a thousand on a matrix of
    10M elements on CPU, where sums are sequential. Parameters without a gradient count as
    nothing. A gradient that is not finite gives a norm that is not.
    """
    parameters = list(parameters)
    norms: dict[int, list[Tensor]] = {}
    counts = [1] * len(parameters) if replicas is None else replicas
    for parameter, count in zip(parameters, counts, strict=True):
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            norms.setdefault(count, []).append(norm)
    device = parameters[0].device if parameters else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for count, same in norms.items():
        total += torch.stack(same).square().sum() / count
    if sum_over_ranks is not None:
        total = sum_over_ranks(total)
    return total.sqrt().float()


def clip_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale every `.grad` in place so that a global norm of `norm` becomes at most `max_norm`.

    A norm that is not finite makes the gradients not finite: check it before the update.
    """
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
