"""What Python imports at the start of every process of a soak: faults that no signal can cause.

`SOAK_FOLDER` names the folder where the soak leaves its orders: `clock` holds the seconds by which
the clock is wrong, `nan` the rank whose next gradient becomes NaN.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_FOLDER = Path(os.environ["SOAK_FOLDER"])
_time, _time_ns = time.time, time.time_ns


def _offset() -> float:
    try:
        return float((_FOLDER / "clock").read_text())
    except (OSError, ValueError):
        return 0.0


time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)


def _poison(gradient_norm: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def poisoned(engine: Any) -> Any:
        order = _FOLDER / "nan"
        with suppress(OSError, ValueError):
            if int(order.read_text()) == engine.grid.rank:
                order.unlink()
                next(iter(engine.optimizer.gradients())).tensor.view(-1)[:1] = float("nan")
        return gradient_norm(engine)

    return poisoned


class _Finder(importlib.abc.MetaPathFinder):
    """Finds trainer.engine as usual, and lets the soak into its gradients."""

    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "trainer.engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            engine = module.NativeEngine
            engine.gradient_norm = _poison(engine.gradient_norm)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
