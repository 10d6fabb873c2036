"""Sources of text to token shards: read, filter, deduplicate, tokenise, publish.

Also the training of the tokenizer and a corpus that needs no download. Names are loaded on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.prepare.demo_cloze import write_demo_cloze
    from data.prepare.demo_corpus import build_demo_corpus
    from data.prepare.merging import merge
    from data.prepare.run import prepare
    from data.prepare.tokenizer_training import train_tokenizer
    from data.prepare.verification import verify

_MODULES = {
    "build_demo_corpus": "demo_corpus",
    "merge": "merging",
    "prepare": "run",
    "train_tokenizer": "tokenizer_training",
    "verify": "verification",
    "write_demo_cloze": "demo_cloze",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
