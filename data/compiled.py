"""Loops over tokens and samples, compiled by numba, which this package requires.

Their machine code is kept on disk for the next start, next to the source or in the user's cache.
Where it can be neither read nor kept, each start compiles again, for some seconds, and nothing else
changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a loop at its first call, or loads what an earlier process compiled.

    A function that it calls is in the same file: the cache is that of a file's contents.
    """
    loop: Any = njit(nogil=True)(function)
    with suppress(RuntimeError):  # neither the source's folder nor the user's cache is writable
        loop._cache = _Cache(function)
    return loop


class _Cache(FunctionCache):
    """Numba's cache on disk, for several processes that compile at the same time.

    Numba writes its index before the code that the index names, under numbers that it gives out
    again: another process may then read the code of an earlier source, or of other types.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        stamp = locator.get_source_stamp()
        name = f"{self._impl.filename_base}-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}"
        self._cache_file = IndexDataCacheFile(locator.get_cache_path(), name, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(Exception):  # whatever unpickling a damaged file raises
            code = super().load_overload(sig, target_context)
            if code is not None and tuple(code.signature.args) == tuple(sig):
                return code
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):  # a full disk
            super().save_overload(sig, data)
