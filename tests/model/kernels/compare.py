"""Comparison of a kernel with its naive version in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal fp32 numbers, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


def _outputs_and_gradients(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Fixed weights, so that every output element has a different gradient.
    weights = [rand(*out.shape, seed=99 + i) for i, out in enumerate(outputs)]
    sum((out * w.to(out.dtype)).sum() for out, w in zip(outputs, weights, strict=True)).backward()
    # What nothing depended on has no gradient, which is then compared as zeros.
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [out.detach() for out in outputs] + grads


def assert_same(kernel: Function, naive: Function, inputs: Sequence[Tensor], rtol: float):
    """Outputs and gradients of every input agree within ``rtol`` of their largest value.

    The naive version gets the inputs' values in float64; weights of the sum whose gradient is taken
    are the same on both sides.
    """
    ours = _outputs_and_gradients(kernel, inputs)
    theirs = _outputs_and_gradients(naive, [x.double() for x in inputs])
    assert len(ours) == len(theirs)
    for number, (actual, other) in enumerate(zip(ours, theirs, strict=True)):
        assert actual.shape == other.shape, number
        assert actual.isfinite().all(), f"result {number} is not finite"
        largest = float(other.abs().max()) if other.numel() else 0.0
        error = float((actual.double() - other).abs().max()) if other.numel() else 0.0
        assert error <= rtol * max(largest, 1e-30), f"result {number}: {error / largest:.2e}"
