"""Matmuls of groups of rows with torch's functions, or MKL's on a CPU.

torch has one kernel for all groups on recent GPUs only; on a CPU it slices and multiplies group by
group, some 20 operator calls each. MKL, which torch's library contains on most x86 machines, has
one call for all groups that also divides them among threads. It returns the same bits.

P rows; E groups; X and Y the inputs and outputs of a matrix.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
"""CBLAS_LAYOUT and CBLAS_TRANSPOSE of the C interface to BLAS."""


def eager_grouped_mm(x_PX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    """Computes `model.kernels.grouped_mm.grouped_mm`."""
    if _by_mkl(x_PX, weight_EYX):
        return _GroupedMM.apply(x_PX, weight_EYX, ends_E)
    return F.grouped_mm(x_PX, weight_EYX.transpose(1, 2), offs=ends_E)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _rows(x, weight, ends, _TRANSPOSED)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad_x = _rows(grad, weight, ends, _PLAIN) if ctx.needs_input_grad[0] else None
        grad_weight = _outer(grad, x, ends) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _rows(x_PX: Tensor, matrices: Tensor, ends_E: Tensor, transposed: int) -> Tensor:
    """Multiplies each group's rows by its matrix, [E, X, Y], or [E, Y, X] where transposed."""
    x_PX, matrices = x_PX.contiguous(), matrices.contiguous()
    width, columns = x_PX.shape[1], matrices.shape[1 if transposed == _TRANSPOSED else 2]
    out_PY = x_PX.new_empty(len(x_PX), columns)
    starts, sizes = _groups(ends_E)
    _multiply(
        (_PLAIN, transposed),
        (sizes, columns, width),
        (_pointers(x_PX, starts), width),
        (_pointers(matrices, np.arange(len(sizes))), matrices.shape[2]),
        (_pointers(out_PY, starts), columns),
    )
    return out_PY


def _outer(grad_PY: Tensor, x_PX: Tensor, ends_E: Tensor) -> Tensor:
    """Computes gradᵀ · x of each group, [E, Y, X]."""
    grad_PY, x_PX = grad_PY.contiguous(), x_PX.contiguous()
    rows, columns = grad_PY.shape[1], x_PX.shape[1]
    out_EYX = x_PX.new_empty(len(ends_E), rows, columns)
    starts, sizes = _groups(ends_E)
    _multiply(
        (_TRANSPOSED, _PLAIN),
        (rows, columns, sizes),
        (_pointers(grad_PY, starts), rows),
        (_pointers(x_PX, starts), columns),
        (_pointers(out_EYX, np.arange(len(sizes))), columns),
    )
    return out_EYX


def _groups(ends_E: Tensor) -> tuple[Any, Any]:
    """Returns each group's first row and its number of rows."""
    ends = ends_E.numpy()
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    return starts, ends - starts


def _pointers(x: Tensor, index: Any) -> Any:
    """Returns addresses of x[i] for each index."""
    stride = x.stride(0) * x.element_size()
    return x.data_ptr() + index.astype(np.uint64) * np.uint64(stride)


def _multiply(
    transposed: tuple[int, int],
    sizes: tuple[Any, Any, Any],
    a: tuple[Any, int],
    b: tuple[Any, int],
    c: tuple[Any, int],
) -> None:
    """Computes C = A · B of every group in one call.

    Args:
        sizes: rows and columns of C, and the length of the sums; each one for all, or by group.
        a, b, c: addresses of the groups' matrices, and the distance of their rows.
    """
    multiply = _batch_function()
    assert multiply is not None
    count = len(c[0])
    integers = np.empty((9, count), np.int32)
    values = (*transposed, *sizes, a[1], b[1], c[1], 1)
    for row, value in zip(integers, values, strict=True):
        row[:] = value
    factors = np.zeros((2, count), np.float32)
    factors[0] = 1
    flags_a, flags_b, m, n, k, row_a, row_b, row_c, group_size = _addresses(integers)
    one, zero = _addresses(factors)
    multiply(
        *(_ROW_MAJOR, flags_a, flags_b, m, n, k, one),
        *(a[0].ctypes.data, row_a, b[0].ctypes.data, row_b, zero),
        *(c[0].ctypes.data, row_c, count, group_size),
    )


def _addresses(rows: Any) -> list[int]:
    return [rows.ctypes.data + i * rows.strides[0] for i in range(len(rows))]


def _by_mkl(*tensors: Tensor) -> bool:
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    on_cpu = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
    return plain and on_cpu and all(x.numel() for x in tensors) and _batch_function() is not None


@functools.cache
def _batch_function() -> Callable[..., None] | None:
    """Returns MKL's cblas_sgemm_batch out of torch's library, or None if it has none."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.cblas_sgemm_batch
    except (OSError, AttributeError):
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [integer, *[pointer] * 13, integer, pointer]
    function.restype = None
    return function
