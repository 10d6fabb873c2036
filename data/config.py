"""What the data pipeline can be told: sources, tokenizer, shards, rows.

Only pydantic and the standard library are imported, so that a login node can read a config.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SourceConfig(BaseModel):
    """One named body of raw text, local files or a dataset of the Hugging Face hub.

    `paths` are files, folders or glob patterns; a folder is searched for `include`. `json` takes
    .jsonl and .json (also .gz, .zst), `parquet` takes tables, and `text` takes every file as one
    document. With `split: hash` each document goes to train or heldout by the hash of its text, so
    two equal documents never fall on both sides; `train` and `heldout` say it outright.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    paths: tuple[str, ...] = ()
    include: tuple[str, ...] = ("**/*",)
    format: Literal["json", "parquet", "text"] = "json"
    dataset: str | None = None
    dataset_subset: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    text_field: str = "text"
    domain: Literal["code", "prose"] = "prose"
    split: Literal["hash", "train", "heldout"] = "hash"

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError(
                f"source {self.name!r} needs either `paths` or `dataset`, and exactly one of them"
            )
        return self


class TokenizerConfig(BaseModel):
    """Where the tokenizer lives and how `train_tokenizer` makes it.

    `path` is a folder that holds `tokenizer.model` (ours) or `tokenizer.json` (imported).
    `vocab_size` counts everything, special tokens included; 129280 selects DeepSeek-V4's own ids.
    `sample_bytes` bounds the UTF-8 bytes of the documents the tokenizer is trained on, and
    `character_coverage` is the share of character occurrences that get a piece of their own; the
    others are written as bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    vocab_size: int = Field(default=129280, ge=384, le=129280)
    sample_bytes: int = Field(default=64_000_000, ge=1)
    character_coverage: float = Field(default=0.9995, gt=0.0, le=1.0)


class DataConfig(BaseModel):
    """Everything between raw text and the rows of a step.

    `row_length` S is the number of input positions of a row; `batch_rows` is the number of rows of
    one optimizer step over all ranks; `micro_rows` is the number of rows a rank runs at once.
    `heldout_fraction` of the documents (by hash) is kept from training. Best-fit packing looks at
    `packing_window` documents at a time: larger wastes less, smaller needs less memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: TokenizerConfig
    shards: str
    row_length: int = Field(ge=2)
    batch_rows: int = Field(ge=1)
    micro_rows: int = Field(default=1, ge=1)
    heldout_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)
    packing_window: int = Field(default=1_000_000, ge=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"every source needs a name of its own, got {', '.join(names)}")
        return self
