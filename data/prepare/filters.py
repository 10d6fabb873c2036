"""The filters that look at one document alone: length, encoding, marks of generators, quality.

Quality is datatrove's: the rules of Gopher (Rae et al. 2021, quality and repetition) and of FineWeb
(Penedo et al. 2024) with their published thresholds, over words of any script. Left out are the
two that only hold for English, stop words and a least mean length of words, and the upper bound of
words, since `max_characters` is there.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from data.config import FiltersConfig, SourceConfig
from data.prepare.corpus import Document

KEPT, LENGTH, ENCODING, GENERATED, QUALITY, EXACT, NEAR, TEMPLATE = range(8)
REASONS = ("kept", "length", "encoding", "generated", "quality", "exact", "near", "template")

_HEAD = 1000  # characters in which a generator says what it is
_MARKS = re.compile(
    r"@generated\b|\b(?:auto|automatically|machine)[- ]?generated\b"
    r"|\bgenerated (?:by|from|with)\b.{0,200}?\bdo not (?:edit|modify)\b",
    re.IGNORECASE | re.DOTALL,
)
# U+FFFD, control codes but tab, line feed, form feed and carriage return, private, no characters.
_GARBLED = re.compile(
    "[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]"
)
# Words are what stands between spaces, as in the Gopher paper; in scripts written without spaces, a
# character.
_NO_SPACES = "\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+")


class Rules:
    """The rules for the documents of one source.

    `judge` gives the reason to leave a document out, or KEPT, and says what spoke against it.
    """

    def __init__(self, filters: FiltersConfig, source: SourceConfig) -> None:
        self.filters = filters
        text = source.content == "text"
        self._marks = filters.generated_code and text and source.domain == "code"
        judged = text and source.domain in filters.quality_domains
        self._quality = [_quality(name) for name in filters.quality_rules] if judged else []

    def judge(self, document: Document) -> tuple[int, str]:
        """(reason, what spoke against the document)."""
        text, filters = document.text, self.filters
        if not filters.min_characters <= len(text) <= filters.max_characters:
            return LENGTH, f"{len(text):,} characters"
        garbled = len(_GARBLED.findall(text))
        if garbled > filters.max_garbled_fraction * len(text):
            return ENCODING, f"{garbled:,} of {len(text):,} characters are garbled"
        if self._marks and (mark := _MARKS.search(text, 0, _HEAD)):
            return GENERATED, " ".join(mark.group().split())
        for rule in self._quality:
            if (found := rule(text)) is not None:
                return QUALITY, found
        return KEPT, ""


@lru_cache(maxsize=1)
def language() -> Any:
    """Words and sentences as datatrove wants them; the import costs half a second.

    A sentence ends with any script's terminal punctuation, or with its line.
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
            return [found.span() for found in sentence.finditer(text)]

    return Words()


@lru_cache(maxsize=3)
def _quality(name: str) -> Callable[[str], str | None]:
    """What one set of rules says against a text; None for a good one."""
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
