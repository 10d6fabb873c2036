"""The assignment of documents to train and validation, a function of the text alone."""

import hashlib

from data.config import SourceConfig

_HASH_BYTES = 8


def document_hash(text: str) -> int:
    """A 64-bit hash of the text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest(), "big")


def is_validation(source: SourceConfig, text: str, fraction: float) -> bool:
    """True where `text` belongs to the validation split of `source`."""
    if source.split == "hash":
        return document_hash(text) < fraction * 2 ** (8 * _HASH_BYTES)
    return source.split == "validation"
