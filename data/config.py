"""Settings of the data pipeline: sources, tokenizer, shards, rows.

Imports pydantic and nothing large, so that a login node can read a config.
"""

import os
import re
from collections.abc import Mapping
from math import gcd
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from data.engine_config import PrepareRayConfig, PrepareSlurmConfig
from data.filter_config import FiltersConfig
from data.section import PathText, PlaceText, Section
from data.storage import absolute, is_url

Rows = Annotated[int, Field(ge=1, le=10**9)]


class SourceConfig(Section):
    """A named body of raw text: local files, or a dataset of the Hugging Face hub."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="letters, digits, and `_.-` except in front",
    )
    """Unique name; shards, metrics and `data.source_weights` use it."""
    paths: tuple[PlaceText, ...] = ()
    """Files, folders or glob patterns; may be URLs: s3://, gs:// and hf:// as paths, https:// for
    single files."""
    include: tuple[str, ...] = ("**/*",)
    """Glob patterns of the files that are read from a folder in `paths`."""
    format: Literal["json", "lines", "parquet", "text", "warc", "wet"] = "json"
    """Format of the files: `json` reads .jsonl and .json, `parquet` reads tables, `text` reads each
    file as a document and `lines` each line; `warc` extracts the text of web pages in archives,
    `wet` takes it as it is. All but tables may be compressed: .gz, .bz2, .xz, .zst."""
    dataset: str | None = None
    """Name of a dataset on the Hugging Face hub, instead of `paths`."""
    dataset_subset: str | None = None
    """Configuration of the dataset; null is its default."""
    dataset_split: str = "train"
    """Split of the dataset."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the dataset; null is its newest."""
    content: Literal["text", "conversation"] = "text"
    """`text`: a record is the string in `text_field`. `conversation`: a record is the list of
    messages in `messages_field`, or the JSON text of such a list, written in DeepSeek-V4's form."""
    text_field: str = "text"
    """Field of a record with its text."""
    messages_field: str = "messages"
    """Field of a record with its conversation."""
    effort_field: str = "reasoning_effort"
    """Field of a record with the effort of its conversation: none, high or max. Without it, high
    where a message has reasoning, otherwise none."""
    prompts_file: PathText | None = None
    """Python file with the prompt texts of conversations, such as the encoder of a released folder
    (`encoding/encoding_dsv4.py`): its string constants are read and nothing is run. Null: this
    project's own texts."""
    domain: Literal["code", "prose"] = "prose"
    """Kind of text, which filters and fill-in-the-middle depend on."""
    split: Literal["hash", "train", "validation"] = "hash"
    """`hash` assigns each document to training or validation by the hash of its text, so that equal
    documents are on the same side; `train` and `validation` assign the whole source."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> "SourceConfig":
        """Either `paths` or `dataset`."""
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError(
                f"source {self.name!r} needs either `paths` or `dataset`, and exactly one of them"
            )
        return self

    @model_validator(mode="after")
    def _can_hold_conversations(self) -> "SourceConfig":
        """`content` = conversation needs `format` = json or parquet; `prompts_file` needs it."""
        if self.content == "conversation" and self.format not in ("json", "parquet"):
            raise ValueError(
                f"source {self.name!r}: conversations are read from `format: json` or `parquet`"
            )
        if self.content == "text" and self.prompts_file is not None:
            raise ValueError(f"source {self.name!r}: `prompts_file` needs `content: conversation`")
        return self

    def with_absolute_paths(self) -> "SourceConfig":
        """The same source with paths that mean the same from any working directory."""
        prompts = self.prompts_file
        update = {
            "paths": tuple(map(absolute, self.paths)),
            "prompts_file": None if prompts is None else os.path.abspath(prompts),
        }
        return self.model_copy(update=update)

    @property
    def field(self) -> str:
        """The field of a record that is read."""
        return self.messages_field if self.content == "conversation" else self.text_field


class CacheConfig(Section):
    """Where shards in object storage are kept on the local disk of every host."""

    folder: PathText | None = None
    """Folder that the processes of a host share; null: `v4-pretrain/shards` in the user's cache."""
    max_bytes: int = Field(default=100 * 10**9, ge=1 << 24, le=10**18)
    """Maximum size, beyond which the oldest blocks are removed. [bytes]"""
    ahead_bytes: int = Field(default=1 << 26, ge=1 << 20, le=1 << 34)
    """Documents of coming steps that a process holds in memory, where the cache has no room for all
    shards. [bytes]"""


class TokenizerConfig(Section):
    """The tokenizer's folder, and how `v4 tokenizer train` trains it."""

    path: PlaceText
    """Folder with `tokenizer.model` (trained here) or `tokenizer.json` (imported); may be a URL. Of
    `hf://org/name`, fetched once, the commit of that time is used; `@COMMIT` names one."""
    vocab_size: int = Field(default=129280, ge=384, le=129280)
    """Number of ids, special tokens included; 129280 has DeepSeek-V4's own ids of special tokens.
    [tokens]"""
    sample_bytes: PositiveInt = 64_000_000
    """Maximum UTF-8 size of the documents that the tokenizer is trained on. [bytes]"""
    character_coverage: float = Field(default=0.9995, gt=0.0, le=1.0)
    """Share of character occurrences that the vocabulary covers; other characters are written as
    bytes."""


class TransformsConfig(Section):
    """What happens to training documents before packing, as a function of (seed, document, epoch).

    See docs/data.md.
    """

    fim_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the documents that become fill-in-the-middle documents: prefix, suffix, middle."""
    fim_spm_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the fill-in-the-middle documents with the suffix first (SPM)."""
    fim_domains: tuple[Literal["code", "prose"], ...] = ("code",)
    """Domains whose documents `fim_rate` applies to."""
    punctuation_split_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the tokens of punctuation and a line break together that are split into two."""


class DataPhase(Section):
    """The rows of a phase of a run, as the loader reads them; documents continue across phases.

    Over the first `rampup_steps` steps the rows of a step grow evenly from `initial_batch_size` to
    `global_batch_size`, in multiples of the greatest common divisor of the two: all numbers between
    them divide over ranks and microbatches if these two do.
    """

    steps: PositiveInt | None = None
    """Number of steps; may be null in the last phase. [steps]"""
    seq_len: int = Field(ge=2)
    """Length of a row, S. [tokens]"""
    global_batch_size: Rows
    """Rows of an optimizer step over all ranks. [rows]"""
    micro_batch_size: Rows = 1
    """Rows of a microbatch on a rank. [rows]"""
    initial_batch_size: Rows | None = None
    """Rows of the first step of a ramp. [rows]"""
    rampup_steps: NonNegativeInt = 0
    """Length of the ramp. [steps]"""
    source_weights: dict[str, float] | None = None
    """The sources' shares of the tokens; null: those of the data config."""

    @model_validator(mode="after")
    def _has_a_whole_ramp(self) -> "DataPhase":
        """Both `initial_batch_size` and `rampup_steps`, or neither."""
        if (self.initial_batch_size is None) != (self.rampup_steps == 0):
            raise ValueError(
                "a ramp needs both `initial_batch_size` and `rampup_steps`, or neither"
            )
        return self

    @property
    def multiple(self) -> int:
        """The rows of every step are a multiple of this."""
        return (
            self.global_batch_size
            if self.initial_batch_size is None
            else gcd(self.initial_batch_size, self.global_batch_size)
        )

    @property
    def sizes(self) -> range:
        """All numbers of rows that a step of the phase can have."""
        first = (
            self.global_batch_size if self.initial_batch_size is None else self.initial_batch_size
        )
        by = self.multiple if first <= self.global_batch_size else -self.multiple
        return range(first, self.global_batch_size + by, by)

    def rows_before(self, steps: int) -> int:
        """Returns the rows of the first `steps` steps.

        Step i of a ramp of n steps has initial_batch_size + m·(L·i // n) rows, where m is
        `multiple` and L the number of multiples from `initial_batch_size` to `global_batch_size`.
        """
        ramp = min(steps, self.rampup_steps)
        rows = (steps - ramp) * self.global_batch_size
        if self.initial_batch_size is not None:
            levels = (self.global_batch_size - self.initial_batch_size) // self.multiple
            rows += ramp * self.initial_batch_size
            rows += self.multiple * _floor_sum(ramp, self.rampup_steps, levels)
        return rows


def _floor_sum(count: int, divisor: int, factor: int) -> int:
    """Returns Σ factor·i // divisor over i < count, by the steps of Euclid's algorithm."""
    total, rest = 0, 0
    while True:
        total += (count - 1) * count // 2 * (factor // divisor) + count * (rest // divisor)
        factor, rest = factor % divisor, rest % divisor
        top = factor * count + rest
        if top < divisor:
            return total
        count, rest = divmod(top, divisor)
        divisor, factor = factor, divisor


class DataConfig(Section):
    """Everything between raw text and the rows of a step; see docs/data.md."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the text comes from."""
    tokenizer: TokenizerConfig
    shards: PlaceText
    """Folder of the token shards; may be a URL, as s3://bucket/shards (docs/storage.md)."""
    seq_len: int = Field(ge=2)
    """Length of a row, S, also of the validation text. [tokens]"""
    global_batch_size: Rows
    """Rows of an optimizer step over all ranks. [rows]"""
    micro_batch_size: Rows = 1
    """Rows of a microbatch on a rank. [rows]"""
    validation_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)
    """Share of the documents, by hash, that is validation text."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """`best_fit` places documents whole where it can; `concatenate` cuts at the end of every
    row."""
    packing_window: PositiveInt = 100_000
    """About how many documents are packed together. [documents]"""
    packing_fill: float = Field(default=0.9995, gt=0.0, le=1.0)
    """Minimum share of row positions with a token: documents no longer than a row are cut only
    where best fit cannot reach it."""
    source_weights: dict[str, float] = Field(default={})
    """The sources' shares of the tokens; empty: in proportion to their sizes, so that every
    source is read once per epoch."""
    assistant_only_loss: tuple[str, ...] = ()
    """Sources of conversations of which only the assistant's tokens are predicted: its reasoning,
    answers, calls of tools and the end of its turns (docs/post-training.md)."""
    transforms: TransformsConfig = TransformsConfig()
    accept_change_at: NonNegativeInt | None = None
    """Step at which a resume accepts that these settings or the shards have changed, and continues
    after the packing window in progress; null: none (docs/resume.md). [steps]"""
    prefetch: int = Field(default=2, ge=0, le=1000)
    """How many steps are prepared ahead, in a thread. [steps]"""
    cache: CacheConfig = CacheConfig()
    prepare_workers: int | None = Field(default=None, ge=1, le=4096)
    """Processes of `v4 data prepare`; null: one per core, of Slurm as many as it gives.
    [processes]"""
    dedup_memory: int = Field(default=2 << 30, ge=1 << 26, le=1 << 42)
    """Memory of each process of `v4 data prepare` that deduplicates, beyond what Python and its
    libraries take. [bytes]"""
    engine: Literal["local", "slurm", "ray"] = "local"
    """What runs `v4 data prepare`: processes of this machine, jobs of Slurm or tasks of Ray, on
    hosts that share the folders in `sources` and `shards` (docs/data.md)."""
    slurm: PrepareSlurmConfig = PrepareSlurmConfig()
    ray: PrepareRayConfig = PrepareRayConfig()
    task_attempts: int = Field(default=3, ge=1, le=1000)
    """How often a unit of work is attempted whose process dies or cannot write. [attempts]"""
    failed_tasks: Literal["stop", "quarantine"] = "stop"
    """What follows when all attempts failed: `stop` ends the work; `quarantine` publishes the
    shards without that unit, which the manifest names."""
    work_folder: PathText | None = None
    """Folder of unfinished shards, where `shards` is a URL: a folder that all hosts share if
    `engine` is slurm or ray; null: in `cache.folder`."""
    max_bad_record_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Maximum share of a source's records that may be bad; they are listed in
    `*.quarantine.jsonl`."""
    filters: FiltersConfig | None = None
    """Null keeps every document; `{}` filters with the defaults."""

    @model_validator(mode="after")
    def _has_unique_names(self) -> "DataConfig":
        """Names of `sources` differ."""
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"every source needs a unique name, got {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _has_possible_weights(self) -> "DataConfig":
        """`source_weights` name sources, are at least 0 and do not sum to 0."""
        self.check_weights(self.source_weights)
        return self

    @model_validator(mode="after")
    def _has_a_shared_folder(self) -> "DataConfig":
        """`work_folder` needs `shards` to be a URL, and `engine` = slurm or ray needs it then."""
        if self.work_folder is not None and not is_url(self.shards):
            raise ValueError("work_folder is for shards at a URL; others are written in place")
        if self.engine != "local" and is_url(self.shards) and self.work_folder is None:
            raise ValueError(
                f"engine = {self.engine} needs `work_folder`, a folder that all hosts share, where "
                "`shards` is a URL"
            )
        return self

    @model_validator(mode="after")
    def _has_assistants(self) -> "DataConfig":
        """`assistant_only_loss` names sources of conversations without fill-in-the-middle."""
        by_name = {source.name: source for source in self.sources}
        for name in self.assistant_only_loss:
            source = by_name.get(name)
            if source is None or source.content != "conversation":
                conversations = [s.name for s in self.sources if s.content == "conversation"]
                raise ValueError(
                    f"assistant_only_loss names {name!r}; the sources of conversations are "
                    f"{', '.join(conversations) or 'none'}"
                )
            if self.transforms.fim_rate and source.domain in self.transforms.fim_domains:
                raise ValueError(
                    f"assistant_only_loss names {name!r}, whose domain {source.domain} is in "
                    "transforms.fim_domains: a rearranged document has no turns; give the source "
                    "another domain"
                )
        return self

    @model_validator(mode="after")
    def _has_one_tokenizer(self) -> "DataConfig":
        """`tokenizer.path` on the hub names its commit where `engine` is slurm or ray."""
        path = self.tokenizer.path
        if self.engine != "local" and path.startswith("hf://") and "@" not in path:
            raise ValueError(
                f"tokenizer.path = {path} should name a commit, as {path}@COMMIT, so that all "
                f"hosts of engine = {self.engine} have the same one"
            )
        return self

    def check_weights(self, weights: dict[str, float]) -> None:
        """Raises ValueError for weights that these sources cannot have."""
        names = [source.name for source in self.sources]
        for name, weight in weights.items():
            if name not in names:
                raise ValueError(
                    f"source_weights names {name!r}; the sources are {', '.join(names)}"
                )
            if not 0 <= weight < float("inf"):
                raise ValueError(f"source_weights.{name} is {weight}; it should be at least 0")
        if weights and not sum(weights.values()):
            raise ValueError("source_weights sum to 0; at least one should be larger")

    def without_weight(self, weights: Mapping[str, float]) -> list[str]:
        """Returns the sources that `weights` do not name, so that they are never trained on.

        Validation sources have no weight, and without `weights` all sources are read.
        """
        if not weights:
            return []
        sources = (source for source in self.sources if source.split != "validation")
        return [source.name for source in sources if source.name not in weights]

    def one_phase(self) -> DataPhase:
        """Returns the rows of a run without phases, and of the validation text."""
        sizes = {
            name: getattr(self, name)
            for name in ("seq_len", "global_batch_size", "micro_batch_size")
        }
        return DataPhase(**sizes)


_FIRST_NAMES = {
    "seq_len": "row_length",
    "global_batch_size": "batch_rows",
    "micro_batch_size": "micro_rows",
    "initial_batch_size": "ramp_from",
    "rampup_steps": "ramp_steps",
    "source_weights": "weights",
    "fim_spm_rate": "fim_spm",
    "punctuation_split_rate": "split_share",
    "max_garbled_fraction": "max_garbled",
    "generated_code": "generated",
    "quality_rules": "quality",
    "exact_duplicates": "exact",
    "near_duplicate_similarity": "near",
    "template_similarity": "template",
    "template_min_documents": "template_group",
}


def fingerprint_text(text: str) -> str:
    """Returns JSON of these configs with the names that fields had in the first version.

    Digests on disk, of shards and of pending expert selections, are made from it, so that they stay
    valid when a field is renamed.
    """
    text = re.sub(r'"(\w+)"(?=:)', lambda key: f'"{_FIRST_NAMES.get(key[1], key[1])}"', text)
    return re.sub(r'("split": ?)"validation"', r'\1"heldout"', text)


def fingerprint_source(source: SourceConfig) -> str:
    """Returns what digests on disk are made from for a source.

    Its files are in them by content, and so are the prompt texts of conversations.
    """
    without = {"paths", "include", "effort_field", "prompts_file"}
    return fingerprint_text(source.model_dump_json(exclude=without))
