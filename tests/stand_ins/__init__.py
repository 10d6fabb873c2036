"""Packages that no developer can run, in plain torch: their signatures, checks and layouts alone.

They show that the right arguments arrive in the right form; not that the libraries are right or
fast. Taken from FlashMLA 1.0.0 (commit 9241ae3), TileKernels (commit 36d9e45) and QuACK 0.6.4
(commit c8ec317).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def importable(*names: str) -> Iterator[None]:
    """Makes the stand-ins importable under the libraries' names."""
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        yield
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]
