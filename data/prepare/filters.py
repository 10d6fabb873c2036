"""The filters of single documents: length, encoding, marks of generated code, quality.

The quality filters are datatrove's: the rules of Gopher (Rae et al. 2021, quality and repetition)
and of FineWeb (Penedo et al. 2024) with their published thresholds, over words of any script. The
two rules for English only are off, stop words and a minimum mean word length, and so is the maximum
number of words, which `max_characters` replaces.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from data.config import FiltersConfig, SourceConfig
from data.prepare.corpus import Document

KEPT, LENGTH, ENCODING, GENERATED, QUALITY, EXACT, NEAR, TEMPLATE = range(8)
REASONS = ("kept", "length", "encoding", "generated", "quality", "exact", "near", "template")

_HEAD = 1000  # characters in which generated code is marked as such
_MARKS = re.compile(
    r"@generated\b|\b(?:auto|automatically|machine)[- ]?generated\b"
    r"|\bgenerated (?:by|from|with)\b.{0,200}?\bdo not (?:edit|modify)\b",
    re.IGNORECASE | re.DOTALL,
)
# U+FFFD, control codes except tab, line feed, form feed and carriage return, private use and
# noncharacters.
_GARBLED = re.compile(
    "[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]"
)
# Words are separated by spaces, as in the Gopher paper; in scripts written without spaces, every
# character is a word.
_NO_SPACES = "\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+")


class Rules:
    """The rules for the documents of one source."""

    def __init__(self, filters: FiltersConfig, source: SourceConfig) -> None:
        self.filters = filters
        text = source.content == "text"
        self._marks = filters.generated_code and text and source.domain == "code"
        has_quality = text and source.domain in filters.quality_domains
        self._quality = [_quality(name) for name in filters.quality_rules] if has_quality else []

    def judge(self, document: Document) -> tuple[int, str]:
        """(KEPT or the reason to drop the document, the reason in detail)."""
        text, filters = document.text, self.filters
        if not filters.min_characters <= len(text) <= filters.max_characters:
            return LENGTH, f"{len(text):,} characters"
        garbled = len(_GARBLED.findall(text))
        if garbled > filters.max_garbled_fraction * len(text):
            return ENCODING, f"{garbled:,} of {len(text):,} characters are garbled"
        if self._marks and (mark := _MARKS.search(text, 0, _HEAD)):
            return GENERATED, " ".join(mark.group().split())
        for rule in self._quality:
            if (detail := rule(text)) is not None:
                return QUALITY, detail
        return KEPT, ""


@lru_cache(maxsize=1)
def language() -> Any:
    """The splitting of text into words and sentences for datatrove; its import takes half a second.

    A sentence ends with terminal punctuation of any script, or with its line.
    """
    from datatrove.utils.text import TERMINAL_PUNCTUATION
    from datatrove.utils.word_tokenizers import WordTokenizer

    end = re.escape("".join(sorted(TERMINAL_PUNCTUATION)))
    sentence = re.compile(rf"[^{end}\n]+[{end}]*|[{end}]+")

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORDS.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return sentence.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in sentence.finditer(text)]

    return Words()


@lru_cache(maxsize=3)
def _quality(name: str) -> Callable[[str], str | None]:
    """A function from a text to the rule that it breaks, or None, for one set of rules."""
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

    words = language()
    if name == "gopher":
        rules = GopherQualityFilter(
            max_doc_words=None, min_avg_word_length=None, min_stop_words=None, language=words
        )
    elif name == "repetition":
        rules = GopherRepetitionFilter(language=words)
    else:
        rules = FineWebQualityFilter(language=words)

    def judge(text: str) -> str | None:
        verdict = rules.filter(TheirDocument(text=text, id=""))
        return None if verdict is True else f"{name}: {verdict[1]}"

    return judge
