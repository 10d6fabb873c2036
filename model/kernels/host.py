"""Fused loops for a CPU, compiled by numba: where they run, and on how many threads.

A kernel is a function of a range of rows and of NumPy arrays, called once by each thread. A row is
computed alike in any range, so no result depends on the number of threads. Numba keeps the machine
code next to the source file (or in the user's cache) and knows by that file's contents when it is
out of date: a kernel therefore calls no compiled function of another file.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.host_calls import call, max_threads

Array = NDArray[np.float32]

_NUMBERS_PER_THREAD = 1 << 14
"""A kernel takes some 5 µs for this many, and a parallel region as long to begin and end."""
_TYPES = {torch.float32: "<f4", torch.int64: "<i8", torch.int32: "<i4"}

log = logging.getLogger(__name__)


class Compilation(event.Listener):
    """What numba compiled of the fused loops in this process.

    Attributes:
        count, seconds: loops compiled, not loaded from a cache, and the time that took.
        is_kept: whether they are kept on disk for later processes.
    """

    def __init__(self) -> None:
        self.count, self.seconds, self.is_kept = 0, 0.0, True
        self._kernels: set[Any] = set()
        self._starts: list[float] = []
        event.register("numba:compile", self)

    def add(self, kernel: Any) -> None:
        """Counts this kernel's compilations."""
        self._kernels.add(kernel)

    def on_start(self, event: event.Event) -> None:
        self._starts.append(time.perf_counter())

    def on_end(self, event: event.Event) -> None:
        seconds = time.perf_counter() - self._starts.pop()
        if event.data["dispatcher"] in self._kernels:
            self.count += 1
            self.seconds += 0.0 if self._starts else seconds  # the caller's time includes it

    def report(self) -> str | None:
        """Returns a sentence about what was compiled; None if nothing was."""
        if not self.count:
            return None
        fate = "kept on disk for the next start" if self.is_kept else "not kept"
        return f"compiled {self.count} fused loops for this CPU in {self.seconds:.0f} s ({fate})"

    def warn_uncached(self, reason: Exception) -> None:
        """Logs once that machine code cannot be read from disk or kept there."""
        if self.is_kept:
            log.warning(
                "the CPU's fused loops cannot be kept on disk, so every start compiles them, in "
                "some 20 s; NUMBA_CACHE_DIR may name a folder for them (%s: %s)",
                *(type(reason).__name__, reason),
            )
        self.is_kept = False


compilation = Compilation()


def fused_loop(function: Callable[..., None]) -> Callable[..., None]:
    """Compiles a kernel at its first call, or loads what an earlier process compiled.

    Sums may run in any order and multiply-adds be fused; infinities and NaN stay what they are, and
    a division by zero gives one instead of an exception, whose check would keep the loop from being
    vectorised.
    """
    fastmath = {"reassoc", "contract", "nsz"}
    kernel: Any = njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    compilation.add(kernel)
    try:
        kernel._cache = _Cache(function)
    except RuntimeError as error:  # neither the source's folder nor the user's cache is writable
        compilation.warn_uncached(error)
    return kernel


class _Cache(FunctionCache):
    """Numba's cache on disk; a kernel that it cannot read or keep is compiled again.

    Numba writes its index before the code files that it names, and reuses their numbers: of several
    ranks that start after a change, one could then load the code of the old source, or of other
    types. So the names of files contain a digest of the source, and types are compared.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        stamp = locator.get_source_stamp()
        name = f"{self._impl.filename_base}-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}"
        self._cache_file = IndexDataCacheFile(locator.get_cache_path(), name, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            code = super().load_overload(sig, target_context)
        except Exception as error:  # whatever unpickling a damaged file raises
            compilation.warn_uncached(error)
            return None
        return code if code is not None and tuple(code.signature.args) == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            compilation.warn_uncached(error)


def runs(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Reports whether the fused loops take these tensors: on a CPU, not shapes alone."""
    return all(x is None or _has_numbers(x, dtype) for x in tensors) and _builds()


def _has_numbers(x: Tensor, dtype: torch.dtype) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter)  # subclasses may have no storage
    return plain and x.device.type == "cpu" and x.dtype == dtype


def array(x: Tensor) -> Any:
    """Returns a tensor as a C-ordered NumPy array, in place if it is contiguous."""
    return np.asarray(_Numbers(x.contiguous()))


class _Numbers:
    """A tensor as NumPy's array interface describes it: two torch operators fewer than numpy()."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x  # keeps the memory
        shape = tuple(x.shape)
        pointer = (x.data_ptr(), False)
        kind = _TYPES[x.dtype]
        self.__array_interface__ = {"version": 3, "typestr": kind, "shape": shape, "data": pointer}


def over_rows(
    kernel: Callable[..., None], first: Tensor, *others: Any, numbers: int | None = None
) -> None:
    """Calls a kernel with (start, stop, arrays and numbers) so that it covers all rows.

    Rows are those of the first tensor, and ``numbers`` how many are computed, by default the first
    tensor's. They are divided among torch's threads where that takes less time than calling them.
    """
    numbers = first.numel() if numbers is None else numbers
    threads = max(min(max_threads(), numbers // _NUMBERS_PER_THREAD), 1)
    arguments = [x.contiguous() if isinstance(x, Tensor) else x for x in (first, *others)]
    call(kernel, len(first), threads, arguments)


@njit(nogil=True)
def _double(start: int, stop: int, x: Array) -> None:
    for i in range(start, stop):
        x[i] *= 2


@functools.cache
def _builds() -> bool:
    try:
        x = torch.ones(2)
        over_rows(_double, x)
        return bool((x == 2).all())
    except Exception as error:  # whatever numba and LLVM raise where they have no back end
        log.warning("the CPU's fused loops cannot be built, plain torch runs instead: %s", error)
        return False
