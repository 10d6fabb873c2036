"""Token shards to the rows of a step: order, mixture, transforms, packing, batches.

Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.rows.audit import MixtureAudit, audit_mixture
    from data.rows.frequencies import token_frequencies
    from data.rows.loader import Batch, Loader, Place
    from data.rows.packing import pack, pack_windows
    from data.rows.permutation import shuffled
    from data.rows.prefetch import Prefetcher
    from data.rows.resume import DataRecord
    from data.rows.shards import matching_manifest
    from data.rows.targets import IGNORE_INDEX, unigram_entropy

_MODULES = {
    "IGNORE_INDEX": "targets",
    "Batch": "loader",
    "DataRecord": "resume",
    "Loader": "loader",
    "Place": "loader",
    "Prefetcher": "prefetch",
    "MixtureAudit": "audit",
    "audit_mixture": "audit",
    "matching_manifest": "shards",
    "pack": "packing",
    "pack_windows": "packing",
    "shuffled": "permutation",
    "token_frequencies": "frequencies",
    "unigram_entropy": "targets",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
