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
    from data.errors import DataError
    from data.manifest import Manifest
    from data.prepare.demo_corpus import build_demo_corpus
    from data.prepare.train_tokenizer import train_tokenizer
    from data.rows.loader import Batch, Loader, unigram_entropy
    from data.rows.prefetch import Prefetcher
    from data.text.tokenizer import Tokenizer

_HOMES = {
    "Batch": "rows.loader",
    "DataConfig": "config",
    "DataError": "errors",
    "Loader": "rows.loader",
    "Manifest": "manifest",
    "Prefetcher": "rows.prefetch",
    "SourceConfig": "config",
    "Tokenizer": "text.tokenizer",
    "TokenizerConfig": "config",
    "build_demo_corpus": "prepare.demo_corpus",
    "train_tokenizer": "prepare.train_tokenizer",
    "unigram_entropy": "rows.loader",
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
