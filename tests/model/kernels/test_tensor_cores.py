"""Eager matmuls on a GPU's tensor cores: where, and what they round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import linear
from model.kernels.tensor_cores import tf32_matmuls


def precision_inside(dtype: torch.dtype, is_cuda: bool) -> str:
    x: Any = SimpleNamespace(dtype=dtype, is_cuda=is_cuda)
    with tf32_matmuls(x):
        return torch.backends.cuda.matmul.fp32_precision


def test_only_low_precision_on_a_gpu_is_rounded() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    assert precision_inside(torch.bfloat16, True) == "tf32"
    assert precision_inside(torch.float32, True) == before
    assert precision_inside(torch.bfloat16, False) == before
    with pytest.raises(RuntimeError), tf32_matmuls(torch.empty(0)):
        raise RuntimeError
    assert torch.backends.cuda.matmul.fp32_precision == before


def tf32(x: Tensor) -> Tensor:
    """Rounds fp32 to the nearest number with 11 bits, ties to even, as tensor cores read it."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_the_router_multiplies_bf16_with_fp32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a GPU computes put in place of `torch.mm`: the same as in fp32 up to the order."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator).bfloat16() for n in (64, 32))
    x.requires_grad_(), weight.requires_grad_()
    expected = linear.fp32_linear(x, weight)
    grad = torch.randn(expected.shape, generator=generator)
    expected_grads = torch.autograd.grad(expected, (x, weight), grad)

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return (a.double() @ b.double()).float()

    monkeypatch.setattr(linear.torch, "mm", mm)
    out = linear._FP32Linear.apply(x, weight)
    truth = x.detach().double() @ weight.detach().double().t()
    assert (out - truth).abs().max() <= 2**-23 * truth.abs().max()
    assert torch.allclose(out, expected, rtol=0, atol=2e-5)
    grads = torch.autograd.grad(out, (x, weight), tf32(grad))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == torch.bfloat16
        # A bf16 step where TF32 moved a sum over the middle of two bf16 numbers.
        assert (ours.float() - theirs.float()).abs().max() <= 2**-7 * theirs.float().abs().max()
        assert (ours != theirs).float().mean() < 0.2
