"""Whether an operation runs in Triton: decided here, by device, dtype and shape alone.

On a CPU the eager version runs, which is plain PyTorch. On a GPU an operation runs in Triton if
Triton supports it and `make bench-gpu` has verified its kernel there; otherwise the eager version
runs, and the choice gives the reason, once in the log and in ``choices``, which training logs at
its start. COMPARED_ON_GPU is empty at present: training runs no Triton kernel. The
functions of `*_triton.py`, called directly, run or raise UnsupportedError. No environment variable
decides this; where Triton does not run, a setting may replace the eager version of some operations
by a compiled one (model/pointwise.py).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch

log = logging.getLogger(__name__)

_HEAD_DIMS = (64, 128, 256, 512)
_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (9, 0)

COMPARED_ON_GPU: frozenset[str] = frozenset()
"""Operations whose Triton kernels `make bench-gpu` has verified on a GPU, out of "attention",
"indexer", "indexer loss", "compressor", "norms", "hyper-connections", "swiglu and combine",
"cross-entropy" and "fp8". Training uses no others: compiled kernels may be wrong where the
interpreter's results are right."""


@dataclass(frozen=True)
class Choice:
    """An implementation and why it was chosen."""

    name: Literal["eager", "triton"]
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


class UnsupportedError(ValueError):
    """Triton was required and cannot run this."""


# With ``required`` each of these chooses Triton or raises UnsupportedError.


@functools.cache
def attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, required: bool = False
) -> Choice:
    """Chooses the implementation of core attention and of the entries' probability mass."""
    unsupported = None if head_dim in _HEAD_DIMS else f"head_dim {head_dim} is not in {_HEAD_DIMS}"
    return _choice("attention", device, dtype, unsupported, required)


@functools.cache
def indexer(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    heads: int,
    topk: int,
    required: bool = False,
) -> Choice:
    """Chooses the implementation of the indexer's selection."""
    unsupported = None
    if dim & (dim - 1) or dim < 16:
        unsupported = f"index_head_dim {dim} is not a power of two of at least 16"
    elif heads & (heads - 1) or not 8 <= heads <= 128:
        unsupported = f"index_n_heads {heads} is not a power of two from 8 to 128"
    elif topk > 1024:
        unsupported = f"index_topk {topk} is above 1024"
    return _choice("indexer", device, dtype, unsupported, required)


@functools.cache
def indexer_loss(
    device: torch.device, dtype: torch.dtype, dim: int, heads: int, required: bool = False
) -> Choice:
    """Chooses the implementation of the indexer's objective.

    fp16 is excluded, since gradients of scores divided by the global token count underflow.
    """
    unsupported = None
    if dim & (dim - 1) or dim < 16:
        unsupported = f"index_head_dim {dim} is not a power of two of at least 16"
    elif heads & (heads - 1) or not 16 <= heads <= 128:
        unsupported = f"index_n_heads {heads} is not a power of two from 16 to 128"
    return _choice("indexer loss", device, dtype, unsupported, required, (torch.bfloat16,))


@functools.cache
def compressor(
    device: torch.device, dtype: torch.dtype, ratio: int, required: bool = False
) -> Choice:
    """Chooses the implementation of window pooling; the softmax is in fp32 for all dtypes."""
    unsupported = None
    if ratio & (ratio - 1) or ratio > 256:
        unsupported = f"compress ratio {ratio} is not a power of two up to 256"
    return _choice("compressor", device, dtype, unsupported, required, (*_DTYPES, torch.float32))


@functools.cache
def norm(device: torch.device, dtype: torch.dtype, dim: int, required: bool = False) -> Choice:
    """Chooses the implementation of RMS norms and rotations, in fp32 for all dtypes."""
    unsupported = None
    if dim % 2 or dim > 16384:
        unsupported = f"a width of {dim} is odd or above 16384"
    return _choice("norms", device, dtype, unsupported, required, (*_DTYPES, torch.float32))


@functools.cache
def hyper_connection(
    device: torch.device, dtype: torch.dtype, streams: int, required: bool = False
) -> Choice:
    """Chooses the implementation of reading and writing the residual streams."""
    unsupported = None if streams in (1, 2, 4) else f"hc_mult {streams} is not 1, 2 or 4"
    return _choice("hyper-connections", device, dtype, unsupported, required)


@functools.cache
def swiglu_and_combine(device: torch.device, dtype: torch.dtype, required: bool = False) -> Choice:
    """Chooses the implementation of SwiGLU and of the MoE combine."""
    return _choice("swiglu and combine", device, dtype, None, required, (*_DTYPES, torch.float32))


@functools.cache
def cross_entropy(device: torch.device, dtype: torch.dtype, required: bool = False) -> Choice:
    """Chooses the implementation of the softmax over the vocabulary, its loss and gradient."""
    return _choice("cross-entropy", device, dtype, None, required, (*_DTYPES, torch.float32))


@functools.cache
def fp8(device: torch.device, dtype: torch.dtype, required: bool = False) -> Choice:
    """Chooses the implementation of FP8 matmuls and of their operands' quantisation."""
    return _choice("fp8", device, dtype, None, required, (torch.bfloat16,))


def choices(
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden: int,
    streams: int,
    head_dim: int,
    index_dim: int,
    index_heads: int,
    index_topk: int,
    ratios: tuple[int, ...],
    in_fp8: bool = False,
) -> dict[str, Choice]:
    """Returns what each operation of a model of these sizes will use."""
    return {
        "attention": attention(device, dtype, head_dim),
        "indexer": indexer(device, dtype, index_dim, index_heads, index_topk),
        "indexer loss": indexer_loss(device, dtype, index_dim, index_heads),
        **{f"compressor, m = {m}": compressor(device, dtype, m) for m in ratios},
        "norms": norm(device, dtype, hidden),
        "hyper-connections": hyper_connection(device, dtype, streams),
        "swiglu and combine": swiglu_and_combine(device, dtype),
        "cross-entropy": cross_entropy(device, dtype),
        **({"fp8": fp8(device, dtype)} if in_fp8 else {}),
    }


def _choice(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    unsupported: str | None,
    required: bool,
    dtypes: tuple[torch.dtype, ...] = _DTYPES,
) -> Choice:
    if device.type != "cuda":
        if required and not _interpreted():
            raise UnsupportedError(
                f"{operation}: Triton runs on a GPU or in its interpreter, not on {device.type}"
            )
        return Choice("triton" if required else "eager", f"on {device.type}")
    if dtype not in dtypes:
        unsupported = f"{dtype} is not one of {', '.join(map(str, dtypes))}"
    elif torch.cuda.get_device_capability(device) < _CAPABILITY:
        unsupported = "the GPU is older than Hopper"
    elif importlib.util.find_spec("triton") is None:
        unsupported = "triton is not installed"
    if required:
        if unsupported is not None:
            raise UnsupportedError(f"{operation}: Triton cannot run this, {unsupported}")
        return Choice("triton", "requested")
    if unsupported is None and operation not in COMPARED_ON_GPU:
        unsupported = "its Triton kernel has not been verified on a GPU yet"
    if unsupported is None:
        return Choice("triton", "Hopper or newer, supported dtype and shape")
    log.warning("%s runs eagerly on this GPU: %s", operation, unsupported)
    return Choice("eager", unsupported)


def _interpreted() -> bool:
    """Whether Triton runs in its interpreter, which takes any shape and dtype."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
