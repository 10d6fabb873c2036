"""The norm and the clipping against torch's own."""

import pytest
import torch
from torch import Tensor

from optim.clip import clip_, gradient_norm


def parameters(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    made = []
    for shape in [(3, 5), (7,), (2, 4, 6), (1,)]:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = scale * torch.randn(shape).to(dtype)
        made.append(parameter)
    made.append(torch.nn.Parameter(torch.zeros(4)))  # no gradient
    return made


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_like_torch(max_norm: float) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    norm = gradient_norm(ours)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    clip_(ours, norm, max_norm)
    for one, other in zip(ours, theirs, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(gradient_norm(ours).item(), min(norm.item(), max_norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_are_summed_exactly(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1_000_000, dtype=dtype))
    parameter.grad = torch.full_like(parameter, 0.01)
    exact = parameter.grad[0].item() * 1000
    norm = gradient_norm([parameter])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=1e-6)


def test_not_a_number_is_detected() -> None:
    inputs = parameters(torch.float32)
    inputs[2].grad[0, 0, 0] = float("nan")
    assert not torch.isfinite(gradient_norm(inputs))


def test_nothing_to_clip() -> None:
    assert gradient_norm([torch.nn.Parameter(torch.zeros(2))]).item() == 0.0
