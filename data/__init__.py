"""Raw text to the rows of a training step.

text -> `datasets` (corpus) -> tokenizer -> .bin/.idx shards (prepare) -> best-fit packing (packing)
-> rows of a step as a function of (seed, step) (loader). Names are loaded on first use, so that
importing the package costs nothing and `data.config` works without torch. `prepare` is not among
them, its module has that name: `from data.prepare import prepare`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.config import DataConfig, SourceConfig, TokenizerConfig
    from data.demo_corpus import build_demo_corpus
    from data.errors import DataError
    from data.loader import Batch, Loader, unigram_entropy
    from data.manifest import Manifest
    from data.prefetch import Prefetcher
    from data.tokenizer import Tokenizer
    from data.tokenizer_training import train_tokenizer

_HOMES = {
    "Batch": "loader",
    "DataConfig": "config",
    "DataError": "errors",
    "Loader": "loader",
    "Manifest": "manifest",
    "Prefetcher": "prefetch",
    "SourceConfig": "config",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "config",
    "build_demo_corpus": "demo_corpus",
    "train_tokenizer": "tokenizer_training",
    "unigram_entropy": "loader",
}
__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "Loader",
    "Manifest",
    "Prefetcher",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "build_demo_corpus",
    "train_tokenizer",
    "unigram_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(f"data.{_HOMES[name]}"), name)
