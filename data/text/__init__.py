"""Text and ids: the tokenizer, DeepSeek-V4's special tokens, and conversations in DSML.

Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.text.answers import Answers
    from data.text.chat_template import export_chat_template
    from data.text.conversation import Conversation, read_messages
    from data.text.dsml import decode, encode, parse, render
    from data.text.hf_tokenizer import SPACE
    from data.text.hub import is_on_hub
    from data.text.prompts import OWN_PROMPTS, Prompts, read_prompts
    from data.text.segments import TURN_TOKENS, Special, encode_segments
    from data.text.special_tokens import BOS, EDGES, EOS, PAD, PAD_ID, base_size, special_ids
    from data.text.tokenizer import (
        HF_FILE,
        MODEL_FILE,
        Tokenizer,
        sentencepiece_schema,
        tokenizer_file,
    )

_MODULES = {
    "Answers": "answers",
    "BOS": "special_tokens",
    "Conversation": "conversation",
    "EDGES": "special_tokens",
    "EOS": "special_tokens",
    "HF_FILE": "tokenizer",
    "MODEL_FILE": "tokenizer",
    "OWN_PROMPTS": "prompts",
    "PAD": "special_tokens",
    "PAD_ID": "special_tokens",
    "Prompts": "prompts",
    "SPACE": "hf_tokenizer",
    "Special": "segments",
    "TURN_TOKENS": "segments",
    "Tokenizer": "tokenizer",
    "base_size": "special_tokens",
    "decode": "dsml",
    "encode": "dsml",
    "encode_segments": "segments",
    "export_chat_template": "chat_template",
    "is_on_hub": "hub",
    "parse": "dsml",
    "read_messages": "conversation",
    "read_prompts": "prompts",
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
