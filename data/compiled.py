"""Loops over tokens and samples, compiled by numba, which this package requires.

Their machine code is cached on disk for the next start, next to the source or in the user's cache.
Where it can be neither read nor written, each start compiles again, which takes some seconds and
changes nothing else.
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

    Functions that it calls are in the same file, since the cache depends on that file's contents.
    """
    loop: Any = njit(nogil=True)(function)
    with suppress(RuntimeError):  # neither the source's folder nor the user's cache is writable
        loop._cache = _Cache(function)
    return loop


class _Cache(FunctionCache):
    """Numba's cache on disk, for several processes that compile at the same time.

    Numba writes its index before the code files that it names, and reuses their numbers: another
    process could then load the code of an earlier source, or of other types. So the names of files
    contain a digest of the source, and types are compared.
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
