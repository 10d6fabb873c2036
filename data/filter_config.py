"""Settings of the filters of `v4 data prepare`."""

import os
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from data.section import PathText, PlaceText, Section
from data.storage import absolute

Domain = Literal["code", "prose"]


class LanguageConfig(Section):
    """Which languages are kept, as a fastText model identifies them."""

    keep: tuple[str, ...] = Field(min_length=1)
    """Languages as the model labels them without `__label__`, as `en`."""
    model: PathText
    """File of the model, such as lid.176.bin; nothing is downloaded."""
    min_score: float = Field(default=0.65, gt=0.0, le=1.0)
    """Minimum probability of one of the languages."""
    domains: tuple[Domain, ...] = ("prose",)
    """Domains that the filter applies to."""


class DecontaminationConfig(Section):
    """Texts that no document should share n-grams of words with, such as those of benchmarks."""

    paths: tuple[PlaceText, ...] = Field(min_length=1)
    """Files, folders or glob patterns with the texts; may be URLs. Of .json and .jsonl each record
    is a text, of .parquet each row, other files are texts; all but tables may be compressed."""
    include: tuple[str, ...] = ("**/*",)
    """Glob patterns of the files that are read from a folder in `paths`."""
    text_field: str = "text"
    """Field of a record with its text."""
    ngram_words: int = Field(default=13, ge=2, le=100)
    """Length of the n-grams; a text of fewer words is one n-gram. [words]"""
    min_matches: PositiveInt = 1
    """Minimum number of a document's n-grams that occur in the texts, to drop it. [n-grams]"""
    min_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Minimum share of a document's n-grams that occur in the texts, to drop it."""


class FiltersConfig(Section):
    """Which documents `v4 data prepare` drops; each is counted under the first filter it fails.

    They apply in the order of the fields, to the text that `pii` = mask has rewritten. `exact`,
    `near` and `template` compare the documents of all sources and keep the first of a group.
    """

    min_characters: NonNegativeInt = 100
    """Filter `length`: shorter documents are dropped. [characters]"""
    max_characters: PositiveInt = 10_000_000
    """Filter `length`: longer documents are dropped. [characters]"""
    max_garbled_fraction: float = Field(default=0.005, ge=0.0, le=1.0)
    """Filter `encoding`: maximum share of characters that are U+FFFD, control codes, private-use or
    unassigned."""
    generated_code: bool = True
    """Filter `generated`: drops code whose first 1000 characters declare that a program wrote
    it."""
    language: LanguageConfig | None = None
    """Filter `language`: drops documents in other languages; null turns it off."""
    quality_rules: tuple[Literal["gopher", "repetition", "fineweb"], ...] = (
        "gopher",
        "repetition",
        "fineweb",
    )
    """Filter `quality`: the rule sets that a document has to pass."""
    quality_domains: tuple[Domain, ...] = ("prose",)
    """Domains that the filter `quality` applies to."""
    decontamination: DecontaminationConfig | None = None
    """Filter `contaminated`: drops documents that share text with given ones, such as benchmarks;
    null turns it off."""
    pii: Literal["mask", "drop"] | None = None
    """E-mail addresses and public IP addresses: `mask` replaces them before anything else sees the
    text; the filter `pii` = drop drops documents with one; null does neither."""
    pii_domains: tuple[Domain, ...] = ("prose",)
    """Domains that `pii` applies to; in code, version numbers look like IP addresses."""
    exact_duplicates: bool = True
    """Filter `exact`: drops documents with the text of an earlier one."""
    near_duplicate_similarity: float | None = Field(default=0.8, gt=0.0, le=1.0)
    """Filter `near`: drops documents whose word 5-grams have at least this Jaccard similarity to an
    earlier document's; null turns it off."""
    template_similarity: float | None = Field(default=0.6, gt=0.0, le=1.0)
    """Filter `template`: minimum Jaccard similarity of word 3-grams, digits masked, within a group
    of pages filled in by a program; null turns it off."""
    template_min_documents: int = Field(default=20, ge=2)
    """Filter `template`: minimum size of such a group. [documents]"""

    def fingerprint(self) -> str:
        """Returns JSON for digests on disk; files are in them by content.

        Fields that the first version did not have are left out where they are off, and where they
        name files.
        """
        left_out: dict[str, Any] = {
            name: True for name in ("language", "decontamination", "pii") if not getattr(self, name)
        }
        if self.pii is None:
            left_out["pii_domains"] = True
        paths = {"language": {"model"}, "decontamination": {"paths", "include"}}
        return self.model_dump_json(exclude=paths | left_out)

    def with_absolute_paths(self) -> "FiltersConfig":
        """The same filters with paths that mean the same from any working directory."""
        language, lists = self.language, self.decontamination
        if language is not None:
            language = language.model_copy(update={"model": os.path.abspath(language.model)})
        if lists is not None:
            lists = lists.model_copy(update={"paths": tuple(map(absolute, lists.paths))})
        return self.model_copy(update={"language": language, "decontamination": lists})
