"""Where eager matmuls of fp32 tensors may use a GPU's tensor cores, which round factors to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)


@contextmanager
def tf32_matmuls(x: Tensor) -> Iterator[None]:
    """Lets fp32 matmuls inside use TF32 on a GPU, for tensors computed from ``x`` in bf16 or fp16.

    TF32 keeps 11 bits of a factor, and sums are in fp32: numbers of bf16 and fp16 stay exact,
    others lose an eighth of what the rounding of results to bf16 does. Where ``x`` is in fp32 or on
    another device nothing changes.
    """
    if not (x.is_cuda and x.dtype in _LOW):
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
