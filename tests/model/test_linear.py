"""Which matmuls are in FP8, and that all others are unchanged; fp32 results of bf16 factors."""

from __future__ import annotations

import re

import pytest
import torch

from model import IGNORE_INDEX
from model.execution import Execution
from model.kernels.fp8 import eager as fp8
from model.linear import FP32OutLinear, fp8_matmuls
from tests.model.tiny import random_model, random_tokens, tiny_config

CONFIG = tiny_config(index_topk=512)  # indexers learn, and rounding changes no selection
IN_EIGHT_BITS = (
    r"(layers\.\d+|mtp\.0)\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight",
    r"(layers\.\d+|mtp\.0)\.ffn\.shared_experts\.w[123]\.weight",
    r"(layers\.\d+|mtp\.0)\.ffn\.experts\.w[123]",
    r"mtp\.0\.(e_proj|h_proj)\.weight",
)


def test_linears_and_experts_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, execution=Execution(matmuls=fp8_matmuls()))
    rounded, shapes = fp8.quantise_dequantise, set()

    def recording(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        if rows == columns:
            shapes.add((x.data_ptr(), x.numel()))
        return rounded(x, rows, columns)

    monkeypatch.setattr(fp8, "quantise_dequantise", recording)
    tokens = random_tokens(CONFIG, 1, 64)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    loss = model(tokens, targets=targets, attention="sparse").loss
    loss.backward()
    names = {name for name, p in model.named_parameters() if (p.data_ptr(), p.numel()) in shapes}
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(re.fullmatch(pattern, name) for pattern in IN_EIGHT_BITS)
    }
    assert names == expected and len(expected) > 20
    plain = random_model(CONFIG)
    exact = plain(tokens, targets=targets, attention="sparse").loss
    exact.backward()
    assert 0 < abs(loss.item() - exact.item()) < 0.02 * exact.item()
    grads = dict(plain.named_parameters())
    for name in expected:
        both = (dict(model.named_parameters())[name].grad, grads[name].grad)
        assert torch.cosine_similarity(*(grad.flatten() for grad in both), dim=0) > 0.8, name


def test_fp32_results_are_the_sums_of_bf16_products() -> None:
    linear = FP32OutLinear(200, 30, torch.bfloat16)
    x = torch.randn(50, 200).bfloat16().requires_grad_()
    out = linear(x)
    assert out.dtype == torch.float32
    wide, weight = x.detach().double(), linear.weight.detach().double()
    torch.testing.assert_close(out.double(), wide @ weight.t(), rtol=0, atol=1e-5)
    grad = torch.randn(50, 30)
    out.backward(grad)
    rounded = grad.bfloat16().double()  # as that of a bf16 result
    for actual, exact in ((x.grad, rounded @ weight), (linear.weight.grad, rounded.t() @ wide)):
        assert actual.dtype == torch.bfloat16
        # Rounded once: half of the last of 8 bits, and a sum near zero may lose some more.
        torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=1e-5)
