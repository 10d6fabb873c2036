"""Pointwise functions that torch.compile fuses, for the `compiled.py` of norms, SwiGLU and streams.

Each compiled function is pure and sees no autograd: it is called inside a hand-written forward or
backward, so `compiled.py` decides what is saved for backward, and grad mode, module mode and
recomputation cause no recompilation. Steps that fusing did not speed up on a CPU stay eager
(docs/performance.md).

A function is compiled at its first call, once for all sizes; calls with fewer than two rows, for
which torch.compile would specialise, run eagerly, and so do calls on the meta device.

Rounding differs from that of the eager versions: sums run in another order, and exp may come from
another math library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CompiledFunction:
    """Compiles a pure function once for all sizes.

    Dim 0 of the first argument is the row dimension. Graph breaks and exceeding the recompile limit
    are errors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def __call__(self, *inputs: Any) -> Any:
        """Returns the function's results."""
        first = inputs[0]
        if first.is_meta or len(first) < 2:
            return self.function(*inputs)
        return self._compiled(*[_unspecialised(x, first.device) for x in inputs])


def _unspecialised(value: Any, device: torch.device) -> Any:
    """Returns an argument in a form that does not trigger specialisation.

    Floats become tensors; tensors are detached and contiguous.
    """
    if isinstance(value, float):
        # torch 2.13 may specialise on a float's value, and its on-disk cache then returns
        # that code to a run with another value.
        return torch.full((), value, device=device)
    return value.detach().contiguous() if isinstance(value, Tensor) else value
