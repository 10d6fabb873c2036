"""Raw text to the rows of a training step.

text -> `datasets` (corpus) -> tokenizer -> .bin/.idx shards (prepare) -> best-fit packing (packing)
-> rows of a step as a function of (seed, step) (loader). Names are loaded on first use, so that
importing the package costs nothing and `data.config` works without torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Batch": "loader",
    "DataConfig": "config",
    "DataError": "errors",
    "Loader": "loader",
    "Manifest": "manifest",
    "SourceConfig": "config",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "config",
    "build_demo_corpus": "demo_corpus",
    "prepare": "prepare",
    "train_tokenizer": "tokenizer_training",
    "unigram_entropy": "loader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(f"data.{_HOMES[name]}"), name)
