"""Addresses of Triton kernels at any size, without memory: in the interpreter, with shapes alone.

Some programs of a launch run, the first and the last of every axis of its grid among them, and of
every loop the first and last steps. A load returns zeros, or for integers what `Launch.integers`
has. Two faults are found: arithmetic of 32-bit integers whose result needs more, and an access
that is not masked and lies outside the memory of its tensor.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

_BASE_BITS = 44
"""Bits of an address within a tensor's memory; those above number the tensor."""


class AddressError(AssertionError):
    """An address or an index that a kernel computes wrongly."""


@dataclass(frozen=True)
class Pointer:
    """A tensor without numbers: bytes before its first element in its memory, and of all of it."""

    dtype: str
    before: int
    size: int


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        arguments: by name, a Pointer or a number.
        integers: by a pointer's name, the number at its first place and that at all others.
    """

    module: str
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    integers: dict[str, tuple[int, int]] = field(default_factory=dict)


def check_addresses(launch: Launch) -> None:
    """Raises AddressError for the first fault of a launch; call it in Triton's interpreter."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, TensorHandle, _implicit_cvt

    kernel = getattr(importlib.import_module(launch.module), launch.name)
    function = kernel.rewrite()
    constants = GridExecutor(function, kernel.arg_names, launch.grid).constexprs
    arguments, pointers = dict[str, Any](), list[tuple[str, Pointer]]()
    for name, value in launch.arguments.items():
        if isinstance(value, Pointer):
            pointers.append((name, value))
            address = (len(pointers) << _BASE_BITS) + value.before
            kind = tl.pointer_type(getattr(tl, value.dtype))
            value = tl.tensor(TensorHandle(np.array([address], np.uint64), kind), kind)
        arguments[name] = value if name in constants else _implicit_cvt(value)
    grid = (*launch.grid, 1, 1)[:3]
    builder = interpreter.interpreter_builder
    with _watched(launch, pointers):
        builder.set_grid_dim(*grid)
        for place in itertools.product(*(sorted({0, count // 2, count - 1}) for count in grid)):
            builder.set_grid_idx(*place)
            function(**arguments)


@contextmanager
def _watched(launch: Launch, pointers: list[tuple[str, Pointer]]) -> Iterator[None]:
    """Compares arithmetic with that of 64 bits and addresses with sizes; no memory is touched."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    before = {name: pointer.before for name, pointer in pointers}

    def accessed(address: Any, mask: Any, size: int) -> str:
        inside = np.broadcast_to(address, mask.shape)[mask]
        if not inside.size:
            return ""
        number = int(inside.flat[0] >> np.uint64(_BASE_BITS))
        name, pointer = pointers[min(max(number, 1), len(pointers)) - 1]
        start = np.uint64(number << _BASE_BITS)
        offset = (inside - start).astype(np.int64)
        if not (offset.min() >= 0 and offset.max() + size <= pointer.size):
            raise AddressError(
                f"{launch.module}.{launch.name}: {name} has {pointer.size:,} bytes, and bytes "
                f"{offset.min():,} to {offset.max() + size:,} are accessed"
            )
        return name

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *_: Any) -> Any:
        kind = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        name = accessed(ptrs.data, mask.data, dtype.itemsize)
        first, others = launch.integers.get(name, (0, 0))
        offset = ptrs.data & np.uint64((1 << _BASE_BITS) - 1)
        is_first = offset == np.uint64(before.get(name, 0))
        value = np.where(is_first, first, others).astype(dtype)
        return TensorHandle(
            value if other is None else np.where(mask.data, value, other.data), kind
        )

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *_: Any) -> None:
        accessed(ptrs.data, mask.data, interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize)

    def add_to(self: Any, operation: Any, ptrs: Any, value: Any, mask: Any, *_: Any) -> Any:
        store(self, ptrs, value, mask)
        return value

    def exact(operation: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, left: Any, right: Any) -> Any:
            out = plain(self, left, right)
            if out.data.dtype == np.int32:
                wide = operation(left.data.astype(np.int64), right.data.astype(np.int64))
                if not np.array_equal(wide, out.data):
                    raise AddressError(
                        f"{launch.module}.{launch.name}: a 32-bit integer should be "
                        f"{wide.flat[np.abs(wide).argmax()]:,}"
                    )
            return out

        return call

    def new_range(*bounds: Any, **_: Any) -> Iterator[Any]:
        steps = range(*bounds)
        for step in steps if len(steps) <= 4 else (*steps[:2], *steps[-2:]):
            yield interpreter._implicit_cvt(step)  # of 32 bits, as compiled code has it

    operations = {"create_add": np.add, "create_sub": np.subtract, "create_mul": np.multiply}
    changes = {
        name: exact(op, getattr(InterpreterBuilder, name)) for name, op in operations.items()
    }
    changes |= {"create_masked_load": load, "create_masked_store": store}
    changes |= {"create_atomic_rmw": add_to}
    with patch.multiple(InterpreterBuilder, **changes), patch.object(tl, "range", new_range):
        yield
