"""Where Triton's kernels can run, and how their choice is logged."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from model.kernel_choices import describe, operations_of, unsupported_by_triton
from model.kernels import backend
from model.kernels.operations import ALL_EAGER, OPERATIONS, Choice, Kernels
from tests.model.tiny import tiny_config

GPU = torch.device("cuda")
CHECKS = [check for check in vars(backend).values() if hasattr(check, "cache_clear")]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU as far as the checks can see, and nothing remembered from other tests."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for check in CHECKS:
        check.cache_clear()
    yield
    for check in CHECKS:
        check.cache_clear()


V4 = {
    "hidden_size": 4096,
    "head_dim": 512,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
}


def unsupported(dtype: torch.dtype, **changes: object) -> dict[str, str]:
    config = tiny_config().model_copy(update=V4 | changes)
    return unsupported_by_triton(config, GPU, dtype, OPERATIONS)


def test_a_hopper_gpu_runs_all_at_v4s_sizes() -> None:
    assert unsupported(torch.bfloat16) == {}


@pytest.mark.parametrize(
    ("changes", "operation", "reason"),
    [
        ({"head_dim": 96}, "attention", "head_dim 96"),
        ({"index_n_heads": 12}, "indexer", "index_n_heads 12"),
        ({"index_n_heads": 8}, "indexer_loss", "index_n_heads 8"),
        ({"index_head_dim": 100}, "indexer_loss", "index_head_dim 100"),
        ({"index_head_dim": 100}, "indexer", "index_head_dim 100"),
        ({"index_topk": 2048}, "indexer", "index_topk 2048"),
        ({"csa_compress_ratio": 12}, "compressor", "compress ratio 12"),
        ({"hidden_size": 20480}, "norms", "a width of 20480"),
        ({"hc_mult": 3}, "hyper_connections", "hc_mult 3"),
    ],
)
def test_what_triton_cannot_do_has_a_reason(
    changes: dict[str, object], operation: str, reason: str
) -> None:
    assert reason in unsupported(torch.bfloat16, **changes)[operation]


def test_fp32_is_left_out_where_tensor_cores_would_round() -> None:
    reasons = unsupported(torch.float32)
    assert {"attention", "indexer", "fp8", "syrk"} <= reasons.keys()
    assert "compressor" not in reasons and "torch.float32" in reasons["attention"]


def test_fp16_underflows_in_the_indexers_objective() -> None:
    assert "torch.float16" in unsupported(torch.float16)["indexer_loss"]


@pytest.mark.parametrize("missing", ["bf16", "nvidia", "triton"])
def test_a_machine_without_one_of_them_runs_none(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "bf16":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    elif missing == "nvidia":  # an MI300 has capability (9, 4)
        monkeypatch.setattr(torch.version, "hip", "7.1")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = unsupported(torch.bfloat16)
    assert reasons.keys() == {*OPERATIONS}
    parts = {"bf16": "capability 7.5, and the kernel needs 8.", "nvidia": "AMD's"}
    assert all(parts.get(missing, "triton") in reason for reason in reasons.values())


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
def test_every_gpu_with_bf16_may_fit_a_kernel(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    without_fp8 = {"fp8"} if capability < (8, 9) else set()
    assert unsupported(torch.bfloat16).keys() == without_fp8


def test_triton_on_a_cpu_without_the_interpreter_raises() -> None:
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


def test_a_model_has_the_operations_of_its_layers() -> None:
    of_model = [name for name in OPERATIONS if name != "syrk"]
    assert [*operations_of(tiny_config())] == [name for name in of_model if name != "fp8"]
    in_fp8 = operations_of(tiny_config(), in_fp8=True)
    assert [*in_fp8] == [name for name in of_model if name != "grouped_mm"]
    window = tiny_config(layer_types=["window"] * len(tiny_config().layer_types))
    assert operations_of(window) == (
        *("attention", "norms", "hyper_connections", "swiglu", "permute", "grouped_mm"),
        "cross_entropy",
    )


def test_one_line_names_every_operation() -> None:
    assert describe(ALL_EAGER, ("attention", "norms")) == "kernels: attention, norms: eager"
    kernels = Kernels(norms=Choice("triton"), attention=Choice(why="head_dim 96"))
    line = describe(kernels, ("attention", "norms", "indexer"))
    assert line == "kernels: attention: eager (head_dim 96); norms: triton; indexer: eager"


def test_the_model_on_a_cpu_imports_no_triton() -> None:
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
