"""Raw text to the rows of a training step.

text -> `datasets` -> tokenizer -> .bin/.idx shards (`data.prepare`) -> best-fit packing -> the rows
of a step as a function of (seed, step) (`data.rows`). Names are loaded on first use, so that
importing the package costs nothing and `data.config` works without torch. The function `prepare`
has the name of its package: `from data.prepare import prepare`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.config import DataConfig, SourceConfig, TokenizerConfig
    from data.errors import DataError
    from data.manifest import Manifest
    from data.prepare import build_demo_corpus, train_tokenizer
    from data.rows import Batch, DataRecord, Loader, Prefetcher, unigram_entropy
    from data.text import Tokenizer

_MODULES = {
    "Batch": "rows",
    "DataConfig": "config",
    "DataError": "errors",
    "DataRecord": "rows",
    "Loader": "rows",
    "Manifest": "manifest",
    "Prefetcher": "rows",
    "SourceConfig": "config",
    "Tokenizer": "text",
    "TokenizerConfig": "config",
    "build_demo_corpus": "prepare",
    "train_tokenizer": "prepare",
    "unigram_entropy": "rows",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
