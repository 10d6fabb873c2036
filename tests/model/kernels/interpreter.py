"""Triton kernels without a GPU: tests run in a separate process, in Triton's interpreter.

The interpreter must be chosen before triton is imported, and would reach into every other test, so
a test marked with `interpreted` is sent by name to one process that serves the whole session. In
it, fresh memory holds NaN or the largest integer, so that an unwritten output shows. A test
module's `small_blocks`, where it has one, is a context around all of its tests, backward included.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import pytest

TIMEOUT = 240


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run in the interpreter's process; skipped off Linux alone."""

    @functools.wraps(test)
    def call(**arguments: Any) -> None:
        _need_linux()
        _process(True).submit(_run, test.__module__, test.__name__, arguments).result(TIMEOUT)

    return call


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run in a process in which triton compiles; skipped off Linux alone."""

    @functools.wraps(test)
    def call(**arguments: Any) -> None:
        _need_linux()
        _process(False).submit(_run, test.__module__, test.__name__, arguments).result(TIMEOUT)

    return call


def _need_linux() -> None:
    # On Linux a test without triton fails: nothing is skipped silently there.
    if sys.platform != "linux":
        pytest.skip("setup.py asks for triton on Linux only, where its wheels are")


@functools.cache
def _process(interpret: bool) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=(interpret,))
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return pool


def _start(interpret: bool) -> None:
    """First thing in the process, before anything imports torch or triton."""
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    import torch

    torch.set_num_threads(1)
    if interpret:
        _quicken()


def _quicken() -> None:
    """Does what Triton's interpreter does, without what takes most of a test's time in it.

    It patches its whole language at every call of a device function, `tl.sum` and each step
    of a sort included; here it does so once, and nothing undoes it. And it takes numbers one by one
    in Python where a sort combines them by xor; numpy gives the same bits.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    reduce = interpreter.ReduceOps.apply_impl

    def apply(self: Any, values: tuple[Any, ...]) -> Any:
        if self.combine_fn != tl.standard._xor_combine:
            return reduce(self, values)
        (value,) = values
        data = np.bitwise_xor.reduce(value.handle.data, self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, value.dtype)

    interpreter.ReduceOps.apply_impl = apply


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    tests = importlib.import_module(module)
    with poisoned(), getattr(tests, "small_blocks", contextlib.nullcontext)():
        getattr(tests, name).__wrapped__(**arguments)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Makes uninitialised memory visible: NaN, or the largest integer of the dtype."""
    import torch

    makers = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    plain = [getattr(module, name) for module, name in makers]

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(
                float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max
            )

        return made

    try:
        for (module, name), make in zip(makers, plain, strict=True):
            setattr(module, name, poison(make))
        yield
    finally:
        for (module, name), make in zip(makers, plain, strict=True):
            setattr(module, name, make)


@contextlib.contextmanager
def last_program_first() -> Iterator[None]:
    """Runs the programs of every launch in reverse, as a GPU might."""
    from triton.runtime.interpreter import interpreter_builder as builder

    plain = builder.set_grid_idx

    def reverse(*place: int) -> None:
        plain(*[size - 1 - i for size, i in zip(builder.grid_dim, place, strict=True)])

    builder.set_grid_idx = reverse
    try:
        yield
    finally:
        builder.set_grid_idx = plain
