"""The manifest of a folder of shards: what it holds, and for which tokenizer.

Readers start from `manifest.json`. It is replaced atomically and names the folder with the shards,
so that a reader finds the old shards or the new ones and never a mixture.
"""

from collections import Counter
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from data.config import DataConfig
from data.errors import DataError, first_problem
from data.files import InsidePath, write_atomically
from data.storage import AnyPath, as_path

MANIFEST_FILE = "manifest.json"
MAX_EXAMPLES = 3
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class Shard(BaseModel):
    """One `.bin/.idx` pair: documents of one source in one split.

    A source and split may have several pairs, its parts, in the manifest's order. `tokens` counts
    bos and eos as well; `bytes` is the UTF-8 size of the text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    domain: str
    split: Split
    name: InsidePath
    documents: int
    tokens: int
    bytes: int
    bin_sha256: str | None = None
    idx_sha256: str | None = None

    @field_validator("split", mode="before")
    @classmethod
    def _old_name(cls, split: object) -> object:
        return "validation" if split == "heldout" else split  # in manifests before version 0.2


class Example(BaseModel):
    """The beginning of a document that a filter dropped, and the reason in detail."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    detail: str


class FilterStats(BaseModel):
    """What one filter dropped: documents, their UTF-8 bytes, and a few examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int = 0
    bytes: int = 0
    examples: tuple[Example, ...] = ()

    def plus(self, other: "FilterStats") -> "FilterStats":
        """The sum of both, with the first `MAX_EXAMPLES` examples."""
        return FilterStats(
            documents=self.documents + other.documents,
            bytes=self.bytes + other.bytes,
            examples=(self.examples + other.examples)[:MAX_EXAMPLES],
        )


class Manifest(BaseModel):
    """The contents of a folder of shards.

    Attributes:
        digest: hash of everything the shards depend on.
        folder: name of the folder with the shards, next to the manifest.
        empty_documents, bad_records: how many were skipped, by source.
        empty_files: how many files had no record, by source; {} before version 0.2.
        dropped: what the filters dropped, by source and filter.
        masked: documents in which personal information was replaced, by source.
        settings: those that the shards were made with, by dotted key; empty before version 0.2.
        complete_digest: of the shards that these would be with the work items in `left_out`; None
            for complete shards.
        left_out: why each work item that is missing failed, by its name.
        token_counts: SHA-256 of the file with the counts of ids (data/token_counts.py); None in
            manifests before version 0.2 and of other tools.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    digest: str
    folder: InsidePath
    tokenizer_hash: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    empty_documents: dict[str, int]
    bad_records: dict[str, int] = {}
    empty_files: dict[str, int] = {}
    dropped: dict[str, dict[str, FilterStats]] = Field(
        default={}, validation_alias=AliasChoices("dropped", "losses")
    )
    masked: dict[str, FilterStats] = {}
    settings: dict[str, Any] = {}
    complete_digest: str | None = None
    left_out: dict[str, str] = {}
    shards: tuple[Shard, ...]
    token_counts: str | None = None

    @field_validator("shards")
    @classmethod
    def _has_unique_names(cls, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        """Raises ValueError for a shard that would be read twice."""
        (name, count), *_ = Counter(shard.name for shard in shards).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"{name} is there {count} times")
        return shards

    @property
    def document_ends(self) -> tuple[int, int] | None:
        """The bos and eos of every document; None for shards of other tools.

        `v4 data prepare` names the folder by the digest.
        """
        return (self.bos_id, self.eos_id) if self.folder == self.digest[:16] else None

    def skipped(self) -> list[str]:
        """Returns a line about each source of which something was skipped or dropped."""
        lines = []
        for name in self.empty_documents:
            dropped = sum(stats.documents for stats in self.dropped.get(name, {}).values())
            counts = {
                "empty documents": self.empty_documents[name],
                "bad records": self.bad_records.get(name, 0),
                "files without a record": self.empty_files.get(name, 0),
                "documents dropped by the filters": dropped,
            }
            parts = [f"{count:,} {what}" for what, count in counts.items() if count]
            if parts:
                lines.append(f"source {name!r}: skipped {', '.join(parts)}")
            if (masked := self.masked.get(name, FilterStats())).documents:
                lines.append(f"source {name!r}: masked addresses in {masked.documents:,} documents")
        for name, reason in self.left_out.items():
            lines.append(
                f"{name} is left out: {reason} (`v4 data prepare --overwrite` tries it again)"
            )
        return lines

    def stale_setting(self, config: DataConfig) -> tuple[str, Any, Any] | None:
        """Returns a key with another value now than when the shards were made, and both values.

        The value now comes first; None if there is no such key. A relative path equals an absolute
        one that ends in it.
        """
        for key, now in preparation_settings(config).items():
            then = self.settings.get(key, now)
            is_same = now == then
            if key.endswith(".paths") and len(now) == len(then):
                is_same = all(map(_is_same_path, now, then))
            if not is_same:
                return key, now, then
        return None

    def of_split(self, split: Split) -> list[Shard]:
        """The shards of one split, in the order of the sources."""
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        """Tokens in one split, bos and eos of every document included."""
        return sum(shard.tokens for shard in self.of_split(split))

    def save(self, shards: AnyPath) -> None:
        """Publishes the manifest in the folder `shards`."""
        write_atomically(shards / MANIFEST_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, shards: str | AnyPath) -> "Manifest":
        """Reads the manifest of a folder; DataError where it is missing or damaged."""
        path = as_path(shards) / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"no {MANIFEST_FILE} in {shards}; make it with `v4 data prepare CONFIG`."
            ) from None
        except PermissionError as error:
            if isinstance(path, Path):
                raise
            raise DataError(f"data.shards = {shards}: {error.strerror}.") from None
        except ValidationError as error:
            raise DataError(
                f"{path} is damaged ({first_problem(error)}); restore it, or make shards in "
                "another data.shards with `v4 data prepare CONFIG`."
            ) from error


def preparation_settings(config: DataConfig) -> dict[str, Any]:
    """Returns the settings that decide what shards hold, by dotted key.

    The tokenizer is not among them: its file is compared.
    """
    settings: dict[str, Any] = {
        "data.validation_fraction": config.validation_fraction,
        "data.filters": "null" if config.filters is None else "a section",
        "data.sources": [source.name for source in config.sources],
    }
    sections: dict[str, BaseModel] = {
        f"sources.{i}": source for i, source in enumerate(config.sources)
    }
    if config.filters is not None:
        sections["filters"] = config.filters
    for section, fields in sections.items():
        values = fields.model_dump(mode="json")
        settings |= {f"data.{section}.{name}": value for name, value in values.items()}
    return settings


def _is_same_path(one: str, other: str) -> bool:
    """Whether two paths are equal, or one is relative and the end of the other."""
    short, long = sorted((PurePath(one).parts, PurePath(other).parts), key=len)
    is_relative = bool(short) and not PurePath(*short).is_absolute()
    return short == long or (is_relative and long[-len(short) :] == short)
