"""Segments: text in which type distinguishes special tokens from their spelling.

`Special` stands for a special token, any other string for plain text. Only a `Special` becomes a
special id, so the spelling of a special token inside a message stays plain text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.text.special_tokens import EOS, NAMED
from data.text.tokenizer import Tokenizer


class Special(str):
    """The spelling of a special token that stands for the token itself."""

    __slots__ = ()


Segment = str  # plain text, or a Special

END = Special(EOS)
USER, ASSISTANT = Special("<｜User｜>"), Special("<｜Assistant｜>")
THINK, END_THINK = Special("<think>"), Special("</think>")
TURN_TOKENS = (USER, ASSISTANT, THINK, END_THINK)
"""Every conversation has some of these."""
DSML, REMINDER = Special("｜DSML｜"), Special("<｜latest_reminder｜>")
EXTRACTED_URL = Special("<｜extracted_url｜>")
TASK_TOKENS = {
    task: Special(f"<｜{task}｜>")
    for task in ("query", "authority", "domain", "read_url", "action", "title")
}

# In flat text a special token is one surrogate, a code point that no plain text has.
_SURROGATES = {token: chr(0xD800 + i) for i, token in enumerate((*NAMED, EOS))}
_TOKENS = {character: Special(token) for token, character in _SURROGATES.items()}
_SPELLINGS = re.compile("|".join(map(re.escape, _SURROGATES)))


def merge(segments: Iterable[Segment]) -> list[Segment]:
    """The same segments with adjacent plain ones joined, and without empty ones."""
    merged: list[Segment] = []
    for segment in segments:
        plain = not isinstance(segment, Special)
        if plain and merged and not isinstance(merged[-1], Special):
            merged[-1] += segment
        elif segment:
            merged.append(segment)
    return merged


def flatten(segments: Iterable[Segment]) -> str:
    """One string, in which every `Special` is a single surrogate."""
    return "".join(_SURROGATES[s] if isinstance(s, Special) else s for s in segments)


def unflatten(flat: str) -> list[Segment]:
    """The segments that `flatten` turned into `flat`."""
    parts = re.split("([\ud800-\udfff])", flat)
    return [_TOKENS.get(part, part) for part in parts if part]


def is_plain(flat: str) -> bool:
    """True where flat text has no special token."""
    return not any(character in _TOKENS for character in flat)


def spelled(text: str) -> list[Segment]:
    """The segments of a trusted text, whose spellings of special tokens are these tokens."""
    return unflatten(_SPELLINGS.sub(lambda match: _SURROGATES[match[0]], text))


def encode_segments(
    documents: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> Iterator[list[NDArray[np.int32]]]:
    """Yields the ids of each document, in arrays one after another; on all cores.

    Raises DataError where the tokenizer lacks one of the special tokens.
    """
    plain = (s for segments in documents for s in segments if not isinstance(s, Special))
    encoded = tokenizer.encode_parts(plain)
    for segments in documents:
        ids: list[NDArray[np.int32]] = []
        for segment in segments:
            if not isinstance(segment, Special):
                ids += next(encoded)
            elif segment in tokenizer.special:
                ids.append(np.array([tokenizer.special[segment]], dtype=np.int32))
            else:
                raise DataError(
                    f"{tokenizer.path} has no special token {segment}; conversations need it."
                )
        yield ids


def decode_segments(ids: Sequence[int], tokenizer: Tokenizer) -> list[Segment]:
    """The segments that `encode_segments` turned into `ids`."""
    spellings = {i: Special(token) for token, i in tokenizer.special.items()}
    segments: list[Segment] = []
    plain: list[int] = []
    for i in [*ids, None]:
        if i is not None and i not in spellings:
            plain.append(i)
            continue
        if plain:
            segments.append(tokenizer.decode(plain))
            plain = []
        if i is not None:
            segments.append(spellings[i])
    return segments
