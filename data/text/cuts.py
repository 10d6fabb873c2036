"""Cuts of long texts that do not change their ids.

A text without pre-tokenisation is one word to the `tokenizers` library, which needs a hundred bytes
for each character of it. In parts it needs them for a part.

A cut is safe where no token can contain both characters beside it: BPE merges neighbours into
pieces of the vocabulary, so two characters that are neighbours in no piece stay apart, and what is
on one side has no influence on the other. With pre-tokenisation a cut is safe between two words;
the words around it are found with and without the cut and compared.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

_PART = 1 << 16  # characters
_WINDOW = 512  # characters on each side that decide about the words beside a cut
_TRIES = 256  # places that are tried before a part becomes longer
# Pre-tokenisers that decide from the text nearby.
_LOCAL = {"Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
# Fields of a BPE model that let tokens depend on more than the pieces.
_FIELDS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")


class Cuts:
    """Cuts texts for one tokenizer.

    Arguments:
        spec: its tokenizer.json.
        engine: the `tokenizers.Tokenizer` without added tokens.
    """

    def __init__(self, spec: dict[str, Any], engine: Any) -> None:
        self._model, self._engine = spec["model"], engine
        normalises = (spec.get("normalizer") or {}).get("normalizers", spec.get("normalizer"))
        words = spec.get("pre_tokenizer")
        is_plain_bpe = self._model.get("type") == "BPE" and not any(
            self._model.get(field) for field in (*_FIELDS, "fuse_unk", "ignore_merges")
        )
        self._has_words = words is not None
        self._can_cut = not normalises and (_is_local(words) if words else is_plain_bpe)

    def parts(self, text: str) -> Iterator[str]:
        """The text in parts whose ids, one after another, are the ids of the text."""
        start, target = 0, _PART
        while self._can_cut and target + _PART < len(text):
            places = range(target, min(target + _TRIES, len(text) - 1))
            place = next((i for i in places if self._is_safe(text, i)), None)
            if place is not None:
                yield text[start:place]
                start = place
            target = (place or target) + _PART
        yield text[start:] if start else text

    def _is_safe(self, text: str, place: int) -> bool:
        if not self._has_words:
            return text[place - 1 : place + 1] not in self._neighbours
        left, right = text[max(0, place - _WINDOW) : place], text[place : place + _WINDOW]
        before, after, whole = map(self._words, (left, right, left + right))
        return whole == before + after

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._engine.pre_tokenizer.pre_tokenize_str(text)]

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Every two characters that are neighbours in a piece."""
        return frozenset(
            piece[i : i + 2] for piece in self._model["vocab"] for i in range(len(piece) - 1)
        )


def _is_local(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_is_local, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in _LOCAL and not pre_tokenizer.get("add_prefix_space")
