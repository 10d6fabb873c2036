"""The rules that each document has to pass, in the order of the fields of `data.filters`."""

import re

from data.config import FiltersConfig, SourceConfig
from data.prepare.corpus import Document
from data.prepare.filters.decontamination import open_texts
from data.prepare.filters.language import identifier
from data.prepare.filters.pii import Masker
from data.prepare.filters.quality import quality_rule

# On disk; new reasons get new numbers.
KEPT, LENGTH, ENCODING, GENERATED, QUALITY, EXACT, NEAR, TEMPLATE = range(8)
LANGUAGE, CONTAMINATED, PII = range(8, 11)
REASONS = (
    *("kept", "length", "encoding", "generated", "quality", "exact", "near", "template"),
    *("language", "contaminated", "pii"),
)
"""Names of the reasons, by number."""
ORDER = (
    *("length", "encoding", "generated", "language", "quality", "contaminated", "pii"),
    *("exact", "near", "template"),
)
"""Names of the filters, in the order in which they apply."""

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


class Rules:
    """The rules for the documents of one source.

    Raises DataError where what they need is not installed or cannot be read.
    """

    def __init__(self, filters: FiltersConfig, source: SourceConfig) -> None:
        self.filters = filters
        text, domain = source.content == "text", source.domain
        self._marks = filters.generated_code and text and domain == "code"
        has_quality = text and domain in filters.quality_domains
        self._quality = [quality_rule(name) for name in filters.quality_rules] * has_quality
        self._language = self._texts = None
        if filters.language is not None and domain in filters.language.domains:
            self._language = identifier(filters.language)
        if filters.decontamination is not None:
            self._texts = open_texts(filters.decontamination)
        self.masker = Masker(filters, source)

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
        if self._language is not None and (detail := self._language(text)) is not None:
            return LANGUAGE, detail
        for rule in self._quality:
            if (detail := rule(text)) is not None:
                return QUALITY, detail
        if self._texts is not None and (detail := self._texts.overlap(text)) is not None:
            return CONTAMINATED, detail
        if filters.pii == "drop" and (detail := self.masker.contents(text)) is not None:
            return PII, detail
        return KEPT, ""
