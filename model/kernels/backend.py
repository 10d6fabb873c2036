"""Where Triton's kernels can run: by device, dtype and shape alone.

Each function raises UnsupportedError, with the reason, where the kernels of an operation cannot
run. The functions of `*_triton.py` call them, and so does the check of a config, before anything is
built. What depends on a GPU's limits, such as its shared memory, is found by compiling for it
(trainer/kernels/). Whether a run uses a kernel is in its `Kernels` (operations.py).
"""

from __future__ import annotations

import functools
import importlib.util

import torch

_HEAD_DIMS = (64, 128, 256, 512)
_DTYPES = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
"""Compute capability of the first GPUs with tensor cores for bf16, and for TF32."""
_OLDEST_WITH_FP8 = (8, 9)


class UnsupportedError(ValueError):
    """Triton was required and cannot run this."""


@functools.cache
def attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Checks core attention and the entries' probability mass."""
    unsupported = None if head_dim in _HEAD_DIMS else f"head_dim {head_dim} is not in {_HEAD_DIMS}"
    _require("attention", device, dtype, unsupported)


@functools.cache
def indexer(device: torch.device, dtype: torch.dtype, dim: int, heads: int, topk: int) -> None:
    """Checks the indexer's selection."""
    unsupported = None
    if dim & (dim - 1) or dim < 16:
        unsupported = f"index_head_dim {dim} is not a power of two of at least 16"
    elif heads & (heads - 1) or not 8 <= heads <= 128:
        unsupported = f"index_n_heads {heads} is not a power of two from 8 to 128"
    elif topk > 1024:
        unsupported = f"index_topk {topk} is above 1024"
    _require("indexer", device, dtype, unsupported)


@functools.cache
def indexer_loss(device: torch.device, dtype: torch.dtype, dim: int, heads: int) -> None:
    """Checks the indexer's objective.

    fp16 is excluded, since gradients of scores divided by the global token count underflow.
    """
    unsupported = None
    if dim & (dim - 1) or dim < 16:
        unsupported = f"index_head_dim {dim} is not a power of two of at least 16"
    elif heads & (heads - 1) or not 16 <= heads <= 128:
        unsupported = f"index_n_heads {heads} is not a power of two from 16 to 128"
    _require("indexer_loss", device, dtype, unsupported, (torch.bfloat16,))


@functools.cache
def compressor(device: torch.device, dtype: torch.dtype, ratio: int) -> None:
    """Checks window pooling; the softmax is in fp32 for all dtypes."""
    unsupported = None
    if ratio & (ratio - 1) or ratio > 256:
        unsupported = f"compress ratio {ratio} is not a power of two up to 256"
    _require("compressor", device, dtype, unsupported, (*_DTYPES, torch.float32))


@functools.cache
def norm(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Checks RMS norms and rotations, in fp32 for all dtypes."""
    unsupported = None
    if dim % 2 or dim > 16384:
        unsupported = f"a width of {dim} is odd or above 16384"
    _require("norms", device, dtype, unsupported, (*_DTYPES, torch.float32))


@functools.cache
def hyper_connection(device: torch.device, dtype: torch.dtype, streams: int) -> None:
    """Checks reading and writing the residual streams."""
    unsupported = None if streams in (1, 2, 4) else f"hc_mult {streams} is not 1, 2 or 4"
    _require("hyper_connections", device, dtype, unsupported)


@functools.cache
def swiglu(device: torch.device, dtype: torch.dtype) -> None:
    """Checks SwiGLU."""
    _require("swiglu", device, dtype, None, (*_DTYPES, torch.float32))


@functools.cache
def permute(device: torch.device, dtype: torch.dtype) -> None:
    """Checks the MoE combine."""
    _require("permute", device, dtype, None, (*_DTYPES, torch.float32))


@functools.cache
def grouped_mm(device: torch.device, dtype: torch.dtype) -> None:
    """Checks the routed experts' matmuls."""
    _require("grouped_mm", device, dtype, None)


@functools.cache
def cross_entropy(device: torch.device, dtype: torch.dtype) -> None:
    """Checks the softmax over the vocabulary, its loss and gradient."""
    _require("cross_entropy", device, dtype, None, (*_DTYPES, torch.float32))


@functools.cache
def fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Checks FP8 matmuls and their operands' quantisation."""
    _require("fp8", device, dtype, None, (torch.bfloat16,), _OLDEST_WITH_FP8)


@functools.cache
def syrk(device: torch.device, dtype: torch.dtype) -> None:
    """Checks the optimizer's symmetric matmul."""
    _require("syrk", device, dtype, None)


def library(name: str) -> None:
    """Checks that an optional package is installed, without importing it."""
    if importlib.util.find_spec(name) is None:
        raise UnsupportedError(f"{name} is not installed")


def _require(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    unsupported: str | None,
    dtypes: tuple[torch.dtype, ...] = _DTYPES,
    oldest: tuple[int, int] = _OLDEST,
) -> None:
    if device.type != "cuda":
        if not _triton_takes(device):
            raise UnsupportedError(
                f"{operation}: Triton runs on a GPU or in its interpreter, not on {device.type}"
            )
        return
    if dtype not in dtypes:
        unsupported = f"{dtype} is not one of {', '.join(map(str, dtypes))}"
    elif torch.version.hip is not None:
        unsupported = "the kernels are written for NVIDIA's GPUs, and this torch is built for AMD's"
    elif (capability := torch.cuda.get_device_capability(device)) < oldest:
        has, needs = (".".join(map(str, version)) for version in (capability, oldest))
        unsupported = f"the GPU has compute capability {has}, and the kernel needs {needs}"
    elif importlib.util.find_spec("triton") is None:
        unsupported = "triton is not installed"
    if unsupported is not None:
        raise UnsupportedError(f"{operation}: Triton cannot run this, {unsupported}")


def _triton_takes(device: torch.device) -> bool:
    """Whether Triton takes tensors of this device: any in its interpreter, else its driver's."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    if triton.knobs.runtime.interpret:
        return True
    try:
        return bool(triton.runtime.driver.active.get_active_torch_device().type == device.type)
    except RuntimeError:  # without a GPU there is no active driver
        return False
