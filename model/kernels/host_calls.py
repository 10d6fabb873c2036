"""Calls of fused loops on the threads of torch's OpenMP pool.

Threads of another pool would compete for the cores with torch's, which spin for milliseconds after
a parallel region in case that another follows. A call writes one table of 64-bit words for all
threads: the numbers of rows and of threads, a place for an error, and the kernel's arguments as
numba represents them. A function compiled for the kernel and the types of its arguments reads the
table and calls the kernel for the rows of its thread.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from torch import Tensor

_TYPES = {torch.float32: types.float32, torch.int64: types.int64, torch.int32: types.int32}
_WORD, _INDEX, _POINTER = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_ROWS, _THREADS, _ERROR, _ARGUMENTS = range(4)
"""Places in the table."""
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMP(NamedTuple):
    """OpenMP's functions: ``run`` calls a function on several threads."""

    run: Callable[..., None]
    thread_number: int


class CompiledCall(NamedTuple):
    """A function that reads its kernel's arguments from a table, the layout of the table, and its
    machine code.
    """

    function: Callable[[Any], None]
    layout: struct.Struct
    library: Any


def call(kernel: Any, rows: int, threads: int, arguments: Sequence[Any]) -> None:
    """Calls a kernel with (start, stop, arguments) so that it covers all rows.

    Args:
        threads: how many share the rows; other threads of torch's pool get none.
        arguments: contiguous tensors, and numbers.

    Raises:
        MemoryError: a thread could not allocate its scratch arrays.
    """
    words: list[Any] = [rows, threads, 0]
    kinds: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            shape, size = x.shape, x.itemsize
            kinds.append((x.dtype, len(shape)))
            strides = [size]
            for extent in shape[:0:-1]:
                strides.append(strides[-1] * extent)
            words += (0, 0, x.numel(), size, x.data_ptr(), *shape, *strides[::-1])
        else:
            kinds.append(float if type(x) is float else int)
            words.append(x)
    compiled = _compiled(kernel, tuple(kinds))
    table = bytearray(compiled.layout.pack(*words))
    address = ctypes.addressof(ctypes.c_char.from_buffer(table))
    openmp = _openmp()
    if threads == 1 or openmp is None:
        compiled.function(address)
    else:
        openmp.run(compiled.function, address, torch.get_num_threads(), 0)
    if struct.unpack_from("=q", table, 8 * _ERROR)[0]:
        raise MemoryError(f"{kernel.__name__}: no memory for a thread's scratch arrays")


def max_threads() -> int:
    """Returns how many threads may share a kernel's rows: torch's, or 1 without OpenMP."""
    return torch.get_num_threads() if _openmp() else 1


@functools.cache
@global_compiler_lock
def _compiled(kernel: Any, kinds: tuple[Any, ...]) -> CompiledCall:
    """Compiles a kernel, unless its cache has it, and the function that calls it.

    Args:
        kinds: of each argument, (dtype, dimensions) of a tensor, float or int.
    """
    arguments = [_numba_type(kind) for kind in kinds]
    signature = (types.int64, types.int64, *arguments)
    kernel.compile(signature)
    result = kernel.overloads[signature]
    target = cpu_target.target_context
    library = target.codegen().create_library(f"call of {kernel.__name__}")
    module = library.create_ir_module(library.name)
    name = f"call.{result.fndesc.llvm_func_name}"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    native = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    _write_body(function, target, native, signature)
    library.add_ir_module(module)
    library.finalize()
    call_with_table = _FUNCTION(library.get_pointer_to_function(name))
    words = [5 + 2 * kind[1] if isinstance(kind, tuple) else 1 for kind in kinds]
    codes = [f"{n}{'d' if kind is float else 'q'}" for n, kind in zip(words, kinds, strict=True)]
    return CompiledCall(call_with_table, struct.Struct(f"={_ARGUMENTS}q{''.join(codes)}"), library)


def _numba_type(kind: Any) -> Any:
    if isinstance(kind, tuple):
        return types.Array(_TYPES[kind[0]], kind[1], "C")
    return types.float64 if kind is float else types.int64


def _write_body(function: Any, target: Any, native: int, signature: tuple[Any, ...]) -> None:
    """Writes code that reads a table and calls the kernel at ``native`` for the thread's rows."""
    arguments = signature[2:]
    builder = ir.IRBuilder(function.append_basic_block())
    words = [_WORD] * _ARGUMENTS + [target.get_data_type(kind) for kind in arguments]
    table = builder.bitcast(function.args[0], ir.LiteralStructType(words).as_pointer())

    def place(index: int) -> Any:
        return builder.gep(table, [_INDEX(0), _INDEX(index)], inbounds=True)

    rows, threads = builder.load(place(_ROWS)), builder.load(place(_THREADS))
    thread: Any = _WORD(0)
    if (openmp := _openmp()) is not None:
        number = _function_at(builder, openmp.thread_number, ir.FunctionType(_INDEX, []))
        thread = builder.zext(builder.call(number, []), _WORD)
    with builder.if_then(builder.icmp_signed("<", thread, threads)):
        ends = thread, builder.add(thread, _WORD(1))
        bounds = [builder.sdiv(builder.mul(rows, end), threads) for end in ends]
        values = [
            target.data_model_manager[kind].load_from_data_pointer(builder, place(_ARGUMENTS + i))
            for i, kind in enumerate(arguments)
        ]
        kernel_type = target.call_conv.get_function_type(types.none, signature)
        kernel = _function_at(builder, native, kernel_type)
        status, _ = target.call_conv.call_function(
            builder, kernel, types.none, signature, [*bounds, *values]
        )
        with builder.if_then(status.is_error, likely=False):
            builder.store(_WORD(1), place(_ERROR))
    builder.ret_void()


def _function_at(builder: Any, address: int, function_type: Any) -> Any:
    return builder.inttoptr(_WORD(address), function_type.as_pointer())


@functools.cache
def _openmp() -> _OpenMP | None:
    """Returns functions of torch's OpenMP library; None if they have other names there."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        run, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    run.argtypes = [_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return _OpenMP(run, ctypes.cast(number, ctypes.c_void_p).value or 0)
