"""Machine code on disk: where there is no place for it, and where several processes write it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from data.compiled import compiled
from model.kernels.host import fused_loop

COMPILERS = [compiled, fused_loop]


def module_of(folder: Path, step: int) -> ModuleType:
    """A module in the folder whose function adds a constant; replaces an earlier one."""
    path = folder / "loops.py"
    path.write_text(f"def add(x):\n    for i in range(len(x)):\n        x[i] += {step}\n")
    spec = importlib.util.spec_from_file_location("loops", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def added(loop: Any, dtype: Any = np.float32) -> float:
    x = np.zeros(3, dtype)
    loop(x)
    return float(x[0])


def test_compiles_where_no_folder_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    assert added(compiled(module_of(tmp_path, 1).add)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), EOFError()])
def test_a_cache_that_fails_costs_time_alone(error, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(FunctionCache, "load_overload", fails)
    monkeypatch.setattr(FunctionCache, "save_overload", fails)
    assert added(compiled(module_of(tmp_path, 1).add)) == 1


@pytest.mark.parametrize("compile_loop", COMPILERS)
def test_is_loaded_by_the_next_process(compile_loop, tmp_path):
    assert added(compile_loop(module_of(tmp_path, 1).add)) == 1
    loop = compile_loop(module_of(tmp_path, 1).add)
    assert added(loop) == 1 and sum(loop.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("compile_loop", COMPILERS)
def test_code_of_an_earlier_source_is_never_run(compile_loop, tmp_path):
    """Between an index that another process has written and the code that it names."""
    assert added(compile_loop(module_of(tmp_path, 1).add)) == 1
    loop = compile_loop(module_of(tmp_path, 2).add)
    index = written_index(loop)
    assert added(loop) == 2 and index


@pytest.mark.parametrize("compile_loop", COMPILERS)
def test_code_of_other_types_is_never_run(compile_loop, tmp_path):
    """Two processes have given the same number to the code of two types."""
    module = module_of(tmp_path, 1)
    for dtype in (np.float32, np.int64):
        assert added(compile_loop(module.add), dtype) == 1
    first, second = sorted((tmp_path / "__pycache__").glob("loops.add*.nbc"))
    shutil.copy(second, first)
    for dtype in (np.float32, np.int64):
        assert added(compile_loop(module.add), dtype) == 1


def written_index(loop: Any) -> dict[Any, str]:
    """The index as another process leaves it that compiles this loop and has not written it yet."""
    from numba import float32

    loop.targetctx.refresh()
    file = loop._cache._cache_file
    key = loop._cache._index_key((float32[::1],), loop.targetctx.codegen())
    index = {key: file._data_name(1)}
    file._save_index(index)
    return index
