"""Matmuls of groups of rows with torch's functions, or MKL's on a CPU.

torch has one kernel for all groups on recent GPUs only; on a CPU it slices and multiplies group by
group, some 20 operator calls each. MKL, which torch's library contains on most x86 machines, has
one call for all groups that also divides them among threads. It returns the same bits.

P rows; E groups; X and Y the inputs and outputs of a matrix.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
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


def eager_grouped_mm_pair(
    x_PX: Tensor, first_EYX: Tensor, second_EYX: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes `model.kernels.grouped_mm.grouped_mm_pair`."""
    if _by_mkl(x_PX, first_EYX, second_EYX):
        return _GroupedPair.apply(x_PX, first_EYX, second_EYX, ends_E)
    first = eager_grouped_mm(x_PX, first_EYX, ends_E)
    return first, eager_grouped_mm(x_PX, second_EYX, ends_E)


def row_alignment(x_PX: Tensor) -> int:
    """Returns what the sizes of groups should be multiples of.

    Kernels of GPUs need aligned groups, and matmuls of a handful of rows take other code paths,
    which round differently: MKL's do so for 1 to 3 rows.
    """
    return 4 if _by_mkl(x_PX) else 16


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        (out,) = _rows([x], [weight], ends, _TRANSPOSED)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            (grad_x,) = _rows([grad], [weight], ends, _PLAIN)
        if ctx.needs_input_grad[1]:
            (grad_weight,) = _outer([grad], x, ends)
        return grad_x, grad_weight, None


class _GroupedPair(torch.autograd.Function):
    """Two matmuls of the same rows: a group's rows stay in the cache from one to the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, first, second, ends)
        a, b = _rows([x, x], [first, second], ends, _TRANSPOSED)
        return a, b

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, ends = ctx.saved_tensors
        grad_x = grad_first = grad_second = None
        if ctx.needs_input_grad[0]:
            (grad_x,) = _rows([grad_a], [first], ends, _PLAIN)
            _rows([grad_b], [second], ends, _PLAIN, add_to=grad_x)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_first, grad_second = _outer([grad_a, grad_b], x, ends)
        return grad_x, grad_first, grad_second, None


def _rows(
    inputs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    ends_E: Tensor,
    transposed: int,
    add_to: Tensor | None = None,
) -> list[Tensor]:
    """Multiplies each group's rows by its matrix, for several inputs and stacks of matrices.

    Matrices are [E, X, Y], or [E, Y, X] where transposed. Returns [P, Y] each, or adds the only
    one to ``add_to``.
    """
    inputs, stacks = [x.contiguous() for x in inputs], [w.contiguous() for w in stacks]
    width, columns = inputs[0].shape[1], stacks[0].shape[1 if transposed == _TRANSPOSED else 2]
    outputs = [x.new_empty(len(x), columns) for x in inputs] if add_to is None else [add_to]
    starts, sizes = _groups(ends_E)
    matrices = np.arange(len(sizes))
    _multiply(
        (_PLAIN, transposed),
        (np.repeat(sizes, len(inputs)), columns, width),
        (_pointers(inputs, starts), width),
        (_pointers(stacks, matrices), stacks[0].shape[2]),
        (_pointers(outputs, starts), columns),
        0 if add_to is None else 1,
    )
    return outputs


def _outer(grads: Sequence[Tensor], x_PX: Tensor, ends_E: Tensor) -> list[Tensor]:
    """Computes gradᵀ · x of each group, for several gradients [P, Y]: [E, Y, X] each."""
    grads, x_PX = [grad.contiguous() for grad in grads], x_PX.contiguous()
    rows, columns = grads[0].shape[1], x_PX.shape[1]
    outputs = [x_PX.new_empty(len(ends_E), rows, columns) for _ in grads]
    starts, sizes = _groups(ends_E)
    _multiply(
        (_TRANSPOSED, _PLAIN),
        (rows, columns, np.repeat(sizes, len(grads))),
        (_pointers(grads, starts), rows),
        (_pointers([x_PX] * len(grads), starts), columns),
        (_pointers(outputs, np.arange(len(sizes))), columns),
        0,
    )
    return outputs


def _groups(ends_E: Tensor) -> tuple[Any, Any]:
    """Returns each group's first row and its number of rows."""
    ends = ends_E.numpy()
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    return starts, ends - starts


def _pointers(tensors: Sequence[Tensor], index: Any) -> Any:
    """Returns addresses of x[i]: for the first index that of every tensor x, then for the next."""
    stride = np.uint64(tensors[0].stride(0) * tensors[0].element_size())
    bases = np.array([x.data_ptr() for x in tensors], np.uint64)
    return (bases + (index.astype(np.uint64) * stride)[:, None]).ravel()


def _multiply(
    transposed: tuple[int, int],
    sizes: tuple[Any, Any, Any],
    a: tuple[Any, int],
    b: tuple[Any, int],
    c: tuple[Any, int],
    beta: float,
) -> None:
    """Computes C = A · B + beta · C of every group in one call.

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
    factors = np.empty((2, count), np.float32)
    factors[0], factors[1] = 1, beta
    flags_a, flags_b, m, n, k, row_a, row_b, row_c, group_size = _addresses(integers)
    alphas, betas = _addresses(factors)
    multiply(
        *(_ROW_MAJOR, flags_a, flags_b, m, n, k, alphas),
        *(a[0].ctypes.data, row_a, b[0].ctypes.data, row_b, betas),
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
