"""Fused loops for a CPU, compiled by numba: where they run, and on how many threads.

A kernel is a function of a range of rows and of NumPy arrays, called once by each thread. A row is
computed alike in any range, so no result depends on the number of threads. Numba keeps the machine
code next to the source file (or in the user's cache) and knows by that file's time when it is out
of date: a kernel therefore calls no compiled function of another file.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
fused_loop = njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)
"""Compiles a kernel. Sums may run in any order and multiply-adds be fused; infinities and NaN stay
what they are, and a division by zero gives one instead of an exception, whose check would keep the
loop from being vectorised."""

_NUMBERS_PER_THREAD = 1 << 18
"""A kernel takes some 50 µs for as many, and a thread as long to wake."""

log = logging.getLogger(__name__)


def runs(*tensors: Tensor | None) -> bool:
    """Reports whether the fused loops take these tensors: fp32 on a CPU, not shapes alone."""
    return all(x is None or _has_numbers(x) for x in tensors) and _builds()


def _has_numbers(x: Tensor) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter)  # subclasses may have no storage
    return plain and x.device.type == "cpu" and x.dtype == torch.float32


def array(x: Tensor) -> Any:
    """Returns fp32 numbers as a C-ordered NumPy array, in place if the tensor is contiguous."""
    return np.asarray(_Numbers(x.contiguous()))


class _Numbers:
    """A tensor as NumPy's array interface describes it: two torch operators fewer than numpy()."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x  # keeps the memory
        shape = tuple(x.shape)
        pointer = (x.data_ptr(), False)
        self.__array_interface__ = {"version": 3, "typestr": "<f4", "shape": shape, "data": pointer}


def over_rows(
    kernel: Callable[..., None], first: Tensor, *others: Any, numbers: int | None = None
) -> None:
    """Calls a kernel with (start, stop, arrays and numbers) so that it covers all rows.

    Rows are those of the first tensor, and ``numbers`` how many are computed, by default the first
    tensor's. They are divided among torch's threads where that takes less time than waking them.
    """
    numbers = first.numel() if numbers is None else numbers
    arguments = [array(x) if isinstance(x, Tensor) else x for x in (first, *others)]
    count = max(min(torch.get_num_threads(), numbers // _NUMBERS_PER_THREAD), 1)
    rows = len(first)
    bounds = [rows * i // count for i in range(count + 1)]
    pairs = list(itertools.pairwise(bounds))
    futures = [_threads().submit(kernel, *pair, *arguments) for pair in pairs[1:]]
    kernel(*pairs[0], *arguments)
    for future in futures:
        future.result()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="host-kernels")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


@njit(nogil=True)
def _double(x: Array) -> None:
    for i in range(len(x)):
        x[i] *= 2


@functools.cache
def _builds() -> bool:
    try:
        x = np.ones(2, dtype=np.float32)
        _double(x)
        return bool((x == 2).all())
    except Exception as error:  # whatever numba and LLVM raise where they have no back end
        log.warning("the CPU's fused loops cannot be built, plain torch runs instead: %s", error)
        return False
