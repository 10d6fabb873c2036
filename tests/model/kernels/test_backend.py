"""Which implementation runs where."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch

from model.kernel_choices import describe, kernel_choices
from model.kernels import backend
from tests.model.tiny import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
V4 = {
    "hidden": 4096,
    "streams": 4,
    "head_dim": 512,
    "index_dim": 128,
    "index_heads": 64,
    "index_topk": 512,
    "ratios": (4, 128),
    "in_fp8": True,
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A GPU as far as the choice can see, and nothing remembered from other tests."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    proved = {"attention", "indexer", "indexer loss", "compressor"}
    proved |= {"norms", "hyper-connections", "swiglu and combine", "cross-entropy", "fp8"}
    monkeypatch.setattr(backend, "COMPARED_ON_GPU", frozenset(proved))
    choices = (backend.attention, backend.indexer, backend.indexer_loss, backend.compressor)
    choices += (backend.norm, backend.hyper_connection, backend.swiglu_and_combine)
    choices += (backend.cross_entropy, backend.fp8)
    for choice in choices:
        choice.cache_clear()
    yield
    for choice in choices:
        choice.cache_clear()


def names(device: torch.device, dtype: torch.dtype, **changes: object) -> dict[str, str]:
    return {k: c.name for k, c in backend.choices(device, dtype, **(V4 | changes)).items()}


def test_a_cpu_runs_eagerly():
    assert set(names(CPU, torch.bfloat16).values()) == {"eager"}


def test_hopper_runs_triton():
    pools = ["compressor, m = 4", "compressor, m = 128"]
    expected = ["attention", "indexer", "indexer loss", *pools]
    expected += ["norms", "hyper-connections", "swiglu and combine", "cross-entropy", "fp8"]
    assert names(GPU, torch.bfloat16) == dict.fromkeys(expected, "triton")


def test_what_no_gpu_has_run_trains_nothing(monkeypatch):
    monkeypatch.setattr(backend, "COMPARED_ON_GPU", frozenset({"indexer"}))
    chosen = names(GPU, torch.bfloat16)
    assert chosen.pop("indexer") == "triton" and set(chosen.values()) == {"eager"}


@pytest.mark.parametrize(
    ("changes", "operation", "reason"),
    [
        ({"head_dim": 96}, "attention", "head_dim 96"),
        ({"index_heads": 12}, "indexer", "index_n_heads 12"),
        ({"index_heads": 8}, "indexer loss", "index_n_heads 8"),
        ({"index_dim": 100}, "indexer loss", "index_head_dim 100"),
        ({"index_dim": 100}, "indexer", "index_head_dim 100"),
        ({"index_topk": 2048}, "indexer", "index_topk 2048"),
        ({"ratios": (12,)}, "compressor, m = 12", "compress ratio 12"),
        ({"hidden": 20480}, "norms", "a width of 20480"),
        ({"streams": 3}, "hyper-connections", "hc_mult 3"),
    ],
)
def test_what_triton_cannot_do_is_logged(changes, operation, reason, caplog):
    with caplog.at_level(logging.WARNING):
        choice = backend.choices(GPU, torch.bfloat16, **(V4 | changes))[operation]
    assert choice.name == "eager" and reason in str(choice)
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda: backend.attention(GPU, torch.bfloat16, 96, required=True), "head_dim 96"),
        (lambda: backend.attention(GPU, torch.float32, 512, required=True), "torch.float32"),
        (
            lambda: backend.indexer(GPU, torch.bfloat16, 128, 12, 512, required=True),
            "index_n_heads",
        ),
        (lambda: backend.indexer_loss(GPU, torch.float16, 128, 64, required=True), "torch.float16"),
        (lambda: backend.compressor(GPU, torch.bfloat16, 12, required=True), "compress ratio 12"),
        (lambda: backend.norm(GPU, torch.bfloat16, 33, required=True), "a width of 33"),
        (lambda: backend.hyper_connection(GPU, torch.bfloat16, 3, required=True), "hc_mult 3"),
        (lambda: backend.swiglu_and_combine(GPU, torch.float64, required=True), "torch.float64"),
        (lambda: backend.fp8(GPU, torch.float16, required=True), "torch.float16"),
    ],
)
def test_what_triton_cannot_do_raises_where_it_is_required(ask, reason):
    with pytest.raises(backend.UnsupportedError, match=reason):
        ask()


def test_required_it_runs_before_a_gpu_has_verified_it(monkeypatch):
    monkeypatch.setattr(backend, "COMPARED_ON_GPU", frozenset())
    assert backend.attention(GPU, torch.bfloat16, 512, required=True).name == "triton"


def test_triton_on_a_cpu_without_the_interpreter_raises():
    code = """
import torch
from model.kernels import backend
from model.kernels.compressor import pool_triton
x, where = torch.zeros(4, 8), torch.zeros(1, dtype=torch.int32)
try:
    pool_triton.pool_windows(x, x, x, where, where.bool(), False)
except backend.UnsupportedError as error:
    assert "compressor: Triton runs on a GPU or in its interpreter, not on cpu" in str(error)
else:
    raise AssertionError("it ran")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_one_line_names_every_operation_of_the_model():
    line = describe(kernel_choices(tiny_config(), CPU, torch.float32))
    assert line == (
        "kernels: attention, indexer, indexer loss, compressor m = 4, compressor m = 16, norms, "
        "hyper-connections, swiglu and combine, cross-entropy: eager (on cpu)"
    )
    eight = describe(kernel_choices(tiny_config(), CPU, torch.bfloat16, in_fp8=True))
    assert eight == line.replace("cross-entropy:", "cross-entropy, fp8:")
    window = tiny_config(layer_types=["window"] * len(tiny_config().layer_types))
    line = describe(kernel_choices(window, CPU, torch.float32))
    operations = "attention, norms, hyper-connections, swiglu and combine, cross-entropy"
    assert line == f"kernels: {operations}: eager (on cpu)"


def test_fp32_runs_eagerly_where_tensor_cores_would_round():
    chosen = names(GPU, torch.float32)
    assert chosen["attention"] == chosen["indexer"] == chosen["fp8"] == "eager"
    assert chosen["compressor, m = 4"] == "triton"


@pytest.mark.parametrize("missing", ["hopper", "triton"])
def test_a_machine_without_one_of_them_runs_eagerly(missing, monkeypatch):
    if missing == "hopper":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(names(GPU, torch.bfloat16).values()) == {"eager"}


def test_the_model_on_a_cpu_imports_no_triton():
    code = """
import sys, torch
from model import SampleLayout, V4Model
from tests.model.tiny import random_model, tiny_config, random_tokens
config = tiny_config()
tokens = random_tokens(config, 1, 40)
random_model(config)(tokens, targets=tokens).loss.backward()
assert "model.kernels.attention.forward_triton" not in sys.modules
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
