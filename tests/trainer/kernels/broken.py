"""A kernel with one line changed, as a slip of its author would."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def broken(name: str, line: str, instead: str) -> Iterator[None]:
    """Puts a module with the changed line in the place of the true one.

    What was imported from the module before keeps the true functions.
    """
    module = importlib.import_module(name)
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(line) == 1, f"{line!r} is in {name} {source.count(line)} times"
    package, leaf = name.rsplit(".", 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{leaf}.py")
        path.write_text(source.replace(line, instead))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        changed = importlib.util.module_from_spec(spec)
        try:
            sys.modules[name] = changed
            spec.loader.exec_module(changed)
            setattr(sys.modules[package], leaf, changed)
            yield
        finally:
            sys.modules[name] = module
            setattr(sys.modules[package], leaf, module)
