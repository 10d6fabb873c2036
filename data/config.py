"""What the data pipeline can be told: sources, tokenizer, shards, rows.

Only pydantic and the standard library are imported, so that a login node can read a config.
"""

import re
from math import gcd
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class SourceConfig(Section):
    """One named body of raw text, local files or a dataset of the Hugging Face hub.

    `paths` are files, folders or glob patterns; a folder is searched for `include`. `json` takes
    .jsonl and .json (also .gz, .zst), `parquet` takes tables, and `text` takes every file as one
    document. With `split: hash` each document goes to train or validation by the hash of its
    text, so two equal documents never fall on both sides; `train` and `validation` say it outright.

    A record of `content: text` is the string in `text_field`. One of `content: conversation` is the
    list in `messages_field`, or the JSON text of such a list, rendered by `data.dsml`; in the
    format `json` these are JSON lines.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    paths: tuple[str, ...] = ()
    include: tuple[str, ...] = ("**/*",)
    format: Literal["json", "parquet", "text"] = "json"
    dataset: str | None = None
    dataset_subset: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    content: Literal["text", "conversation"] = "text"
    text_field: str = "text"
    messages_field: str = "messages"
    domain: Literal["code", "prose"] = "prose"
    split: Literal["hash", "train", "validation"] = "hash"

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError(
                f"source {self.name!r} needs either `paths` or `dataset`, and exactly one of them"
            )
        if self.content == "conversation" and self.format == "text":
            raise ValueError(
                f"source {self.name!r}: conversations are read from `format: json` or `parquet`"
            )
        return self

    @property
    def field(self) -> str:
        """The field of a record that is read."""
        return self.messages_field if self.content == "conversation" else self.text_field


class TokenizerConfig(Section):
    """Where the tokenizer lives and how `train_tokenizer` makes it.

    `path` is a folder that holds `tokenizer.model` (ours) or `tokenizer.json` (imported).
    `vocab_size` counts everything, special tokens included; 129280 selects DeepSeek-V4's own ids.
    `sample_bytes` bounds the UTF-8 bytes of the documents the tokenizer is trained on, and
    `character_coverage` is the share of character occurrences that get a piece of their own; the
    others are written as bytes.
    """

    path: str
    vocab_size: int = Field(default=129280, ge=384, le=129280)
    sample_bytes: PositiveInt = 64_000_000
    character_coverage: float = Field(default=0.9995, gt=0.0, le=1.0)


class FiltersConfig(Section):
    """Which documents `prepare` leaves out; each is counted under the first rule that it fails.

    `length`: fewer than `min_characters` or more than `max_characters`. `encoding`: a share of
    characters over `max_garbled_fraction` that are U+FFFD, control codes, private or no characters.
    `generated`: code that says of itself, in its first lines, that a program wrote it. `quality`:
    the rules named in `quality`, for text of the domains in `quality_domains`. Then, over all
    sources together, the first of its kind stays: `exact` duplicates, `near` duplicates from that
    Jaccard similarity of word 5-grams on, and `template`, groups of `template_min_documents` or
    more pages whose word 3-grams, digits masked, are similar from that share on. `near` and
    `template` may be null.
    """

    min_characters: NonNegativeInt = 100
    max_characters: PositiveInt = 10_000_000
    max_garbled_fraction: float = Field(default=0.005, ge=0.0, le=1.0)
    generated_code: bool = True
    quality_rules: tuple[Literal["gopher", "repetition", "fineweb"], ...] = (
        "gopher",
        "repetition",
        "fineweb",
    )
    quality_domains: tuple[Literal["code", "prose"], ...] = ("prose",)
    exact_duplicates: bool = True
    near_duplicate_similarity: float | None = Field(default=0.8, gt=0.0, le=1.0)
    template_similarity: float | None = Field(default=0.6, gt=0.0, le=1.0)
    template_min_documents: int = Field(default=20, ge=2)


class TransformsConfig(Section):
    """What is done to documents of the train split before packing, by (seed, document, epoch).

    `fim_rate` of the documents of the domains in `fim_domains` become fill-in-the-middle documents:
    prefix, suffix, middle (PSM), or suffix first (SPM) for the share `fim_spm_rate` of these.
    `punctuation_split_rate` of the tokens that join punctuation and a line break are split into
    the two.
    """

    fim_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    fim_spm_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    fim_domains: tuple[Literal["code", "prose"], ...] = ("code",)
    punctuation_split_rate: float = Field(default=0.0, ge=0.0, le=1.0)


class DataPhase(Section):
    """A part of a run with its own rows; the documents go on where the phase before ended.

    The last phase has no end, so that its `steps` may be absent. Over the first `rampup_steps`
    steps the rows of a step grow evenly from `initial_batch_size` to `global_batch_size`, in
    multiples of what divides both: where ranks and microbatches can share out these two, they can
    all between them. `source_weights` absent: those of the data config.
    """

    steps: PositiveInt | None = None
    seq_len: int = Field(ge=2)
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    initial_batch_size: PositiveInt | None = None
    rampup_steps: NonNegativeInt = 0
    source_weights: dict[str, float] | None = None

    @model_validator(mode="after")
    def _ramp(self) -> "DataPhase":
        if (self.initial_batch_size is None) != (self.rampup_steps == 0):
            raise ValueError(
                "a ramp needs both `initial_batch_size` and `rampup_steps`, or neither"
            )
        return self

    @property
    def multiple(self) -> int:
        """What the rows of every step are a multiple of."""
        return (
            self.global_batch_size
            if self.initial_batch_size is None
            else gcd(self.initial_batch_size, self.global_batch_size)
        )

    @property
    def sizes(self) -> range:
        """All numbers of rows that a step may have."""
        first = (
            self.global_batch_size if self.initial_batch_size is None else self.initial_batch_size
        )
        by = self.multiple if first <= self.global_batch_size else -self.multiple
        return range(first, self.global_batch_size + by, by)

    def rows_before(self, steps: int) -> int:
        """Rows of the first `steps` steps: of the ramp's, step i of n has from + m·(L·i // n).

        m is `multiple` and L the number of multiples from `initial_batch_size` to
        `global_batch_size`.
        """
        ramp = min(steps, self.rampup_steps)
        rows = (steps - ramp) * self.global_batch_size
        if self.initial_batch_size is not None:
            levels = (self.global_batch_size - self.initial_batch_size) // self.multiple
            rows += ramp * self.initial_batch_size
            rows += self.multiple * _floor_sum(ramp, self.rampup_steps, levels)
        return rows


def _floor_sum(count: int, divisor: int, factor: int) -> int:
    """Σ factor·i // divisor over i < count, as Euclid's algorithm finds a common divisor."""
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
    """Everything between raw text and the rows of a step.

    `seq_len` S is the number of input positions of a row; `global_batch_size` is the number of rows
    of one optimizer step over all ranks; `micro_batch_size` is the number of rows a rank runs at
    once. `validation_fraction` of the documents (by hash) is kept from training. `packing` looks at
    about `packing_window` documents at a time, and its rows are `packing_fill` full: documents no
    longer than a row are cut only where best fit cannot reach that. `source_weights` are the
    sources' shares of the tokens; without them, an epoch of every source is an epoch of all.
    `prefetch` steps are made ready ahead of their turn. `prepare_workers` processes make the
    shards, one for each core if absent. `max_bad_record_fraction` of a source's records may be bad;
    they are quarantined. `filters`, if given, leave documents out.
    """

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: TokenizerConfig
    shards: str
    seq_len: int = Field(ge=2)
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    validation_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    packing_window: PositiveInt = 100_000
    packing_fill: float = Field(default=0.9995, gt=0.0, le=1.0)
    source_weights: dict[str, float] = {}
    transforms: TransformsConfig = TransformsConfig()
    prefetch: NonNegativeInt = 2
    prepare_workers: PositiveInt | None = None
    max_bad_record_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    filters: FiltersConfig | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"every source needs a name of its own, got {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _weights(self) -> "DataConfig":
        self.check_weights(self.source_weights)
        return self

    def check_weights(self, weights: dict[str, float]) -> None:
        """Raise ValueError for weights that these sources cannot have."""
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

    def one_phase(self) -> DataPhase:
        """The rows of a run that has no phases, and those of the validation text."""
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
    """JSON of these configs with the names that fields had in the first version.

    Digests on disk (of shards, of choices that wait for their step) are made from it, so that a
    renamed field makes nothing stale.
    """
    text = re.sub(r'"(\w+)"(?=:)', lambda key: f'"{_FIRST_NAMES.get(key[1], key[1])}"', text)
    return re.sub(r'("split": ?)"validation"', r'\1"heldout"', text)
