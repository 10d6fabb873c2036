"""Which matmuls are in FP8, and that all others are unchanged."""

from __future__ import annotations

import re

import pytest
import torch

from model import IGNORE_INDEX
from model.execution import Execution
from model.kernels.fp8 import eager as fp8
from model.linear import FP8
from tests.model.tiny import random_model, random_tokens, tiny_config

CONFIG = tiny_config()
IN_EIGHT_BITS = (
    r"(layers\.\d+|mtp\.0)\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight",
    r"(layers\.\d+|mtp\.0)\.ffn\.shared_experts\.w[123]\.weight",
    r"(layers\.\d+|mtp\.0)\.ffn\.experts\.w[123]",
    r"mtp\.0\.(e_proj|h_proj)\.weight",
)


def test_linears_and_experts_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, execution=Execution(matmuls=FP8))
    rounded, shapes = fp8.quantise_dequantise, set()

    def recording(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        if rows == columns:
            shapes.add((x.data_ptr(), x.numel()))
        return rounded(x, rows, columns)

    monkeypatch.setattr(fp8, "quantise_dequantise", recording)
    tokens = random_tokens(CONFIG, 1, 64)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    loss = model(tokens, targets=targets).loss
    loss.backward()
    names = {name for name, p in model.named_parameters() if (p.data_ptr(), p.numel()) in shapes}
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(re.fullmatch(pattern, name) for pattern in IN_EIGHT_BITS)
    }
    assert names == expected and len(expected) > 20
    plain = random_model(CONFIG)
    exact = plain(tokens, targets=targets).loss
    exact.backward()
    assert 0 < abs(loss.item() - exact.item()) < 0.02 * exact.item()
    grads = dict(plain.named_parameters())
    for name in expected:
        both = (dict(model.named_parameters())[name].grad, grads[name].grad)
        assert torch.cosine_similarity(*(grad.flatten() for grad in both), dim=0) > 0.8, name
