"""Text and ids: the tokenizer, DeepSeek-V4's special tokens, and conversations in DSML.

Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.text.dsml import Special, encode_segments, read_messages, render
    from data.text.hf_tokenizer import SPACE
    from data.text.special_tokens import BOS, EDGES, EOS, PAD, PAD_ID, base_size, special_ids
    from data.text.tokenizer import MODEL_FILE, Tokenizer, sentencepiece_schema, tokenizer_file

_MODULES = {
    "BOS": "special_tokens",
    "EDGES": "special_tokens",
    "EOS": "special_tokens",
    "MODEL_FILE": "tokenizer",
    "PAD": "special_tokens",
    "PAD_ID": "special_tokens",
    "SPACE": "hf_tokenizer",
    "Special": "dsml",
    "Tokenizer": "tokenizer",
    "base_size": "special_tokens",
    "encode_segments": "dsml",
    "read_messages": "dsml",
    "render": "dsml",
    "sentencepiece_schema": "tokenizer",
    "special_ids": "special_tokens",
    "tokenizer_file": "tokenizer",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
