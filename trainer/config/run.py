"""The root of a run's configuration, and how it is read. Imports no torch.

    config = load_config("configs/debug.yaml", ["steps=20", "data.global_batch_size=8"])

Unknown keys, wrong types and contradicting values raise ConfigError with one sentence.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from data.config import DataConfig, PlaceText
from data.section import PathText
from data.storage import AnyPath, absolute, as_path
from model.config import LossWeight, ModelConfig
from optim.config import OptimConfig
from trainer.config.checks import name_phase, phase_problems, rows_of, run_problems
from trainer.config.evaluation import EvaluationConfig
from trainer.config.explain import explain
from trainer.config.kernels import AUTO, KernelSetting, setting_of
from trainer.config.operation import ProfileConfig, WatchdogConfig
from trainer.config.parallel import ParallelConfig
from trainer.config.phases import BiasSpeed, PhaseConfig, Quantisation
from trainer.config.post import PostConfig
from trainer.config.published import folder_name, published
from trainer.config.recipe import Recipe, Segment
from trainer.config.renamed import drop_unset
from trainer.config.section import Section, UserPath
from trainer.config.source import COMMAND_LINE, ConfigError, Defaults, dump_yaml, read_source
from trainer.config.stability import StabilityConfig
from trainer.parallel.degrees import Degrees

Root = TypeVar("Root", bound=BaseModel)
CONFIG_FILE = "config.yaml"
_OUTPUTS = ("metrics.jsonl", "checkpoints")
"""What a run folder has once the run has begun."""


class TokenIds(Protocol):
    """What a tokenizer and a manifest of shards both define."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: NonNegativeInt = 1000
    """Interval of checkpoints; 0 writes only the last one, and one on SIGTERM or SIGINT. [steps]"""
    keep: NonNegativeInt = 3
    """How many of the newest are kept, and one more until a finite loss shows that the newest is
    sound; 0 keeps all. [checkpoints]"""
    folder: PlaceText | None = None
    """Where they are: a folder on a larger disk, or a URL such as s3://bucket/run, of this run
    alone (docs/storage.md); null: `checkpoints/` in the run folder."""
    mode: Literal["auto", "async", "sync"] = "auto"
    """`async` copies what is saved to host memory and writes it beside training; `sync` stops steps
    until it is written, as every mode does for the last checkpoint and at a signal. `auto` is async
    where the engine is native and the host has the memory (docs/resume.md)."""


class WandbConfig(Section):
    """Weights & Biases; the API key comes from wandb's own login and is never written to a file."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where an API key is found, else offline (`wandb sync` uploads it later)."""
    project: str = "v4-pretrain"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; null is the default of the login."""
    name: str | None = None
    """Name of the run; null: wandb chooses one."""
    group: str | None = None
    """Group of runs, such as the seeds of one experiment."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class MetricsConfig(Section):
    """What is logged; `metrics.jsonl` has one object per step in any case."""

    every: PositiveInt = 1
    """Interval of plain progress lines, and of points sent to wandb. [steps]"""
    layer_stats_every: NonNegativeInt = 100
    """Interval of layer stats (loads of experts, router biases, sinks, streams, SwiGLU) and update
    sizes, which run one more forward pass of a microbatch, copy the weights to the host and wait
    for the device; 0 collects them only after the last step. [steps]"""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device, for `mfu`; null is the data sheet's for bf16 where precision is bf16 or
    fp8 and the GPU is a known one. [TFLOP/s]"""
    tensorboard: bool = False
    """Also write TensorBoard's events into `tensorboard` of the run folder; needs the package
    tensorboard."""
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    """The fields at the top of a run's config file, and its sections."""

    run_dir: UserPath
    """Folder of the run: config.yaml, tokenizer/, metrics.jsonl, checkpoints/, wandb/. A command
    that is given a run folder works in that folder, whatever its config.yaml has here."""
    steps: Annotated[int, Field(ge=0, le=10**15)] = 0
    """Optimizer steps of the whole run, those before a resume included. With `phases`, whose tokens
    determine the number, omit it or give 0 or that number. [steps]"""
    seed: Annotated[int, Field(ge=0, le=10**18)] = 0
    """Seed of initial weights and data order."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """`bf16` computes in bfloat16, with fp32 master weights in the optimizer; `fp8` is bf16 with
    the matmuls of linears and experts in FP8 (docs/quantisation.md)."""
    engine: Literal["native", "deepspeed"] = "native"
    """`deepspeed` trains with DeepSpeed's optimizer and its ZeRO stages."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own settings, in its own format (docs/deepspeed.md)."""
    mtp_loss_weight_in_decay: LossWeight | None = 0.1
    """MTP loss weight in the learning rate's decay, at most model.mtp_loss_weight (report §4.2);
    null: model.mtp_loss_weight."""
    router_bias_speed: BiasSpeed = 0.001
    """Change of a router's bias per step, against the load (V3 §2.1.2, report §4.2)."""
    quantisation: Quantisation = "none"
    """`mxfp4` trains for inference as released: routed experts and the indexer's queries and keys
    in MXFP4 (report §3.4), attention's keys and entries in FP8; `mxfp4_without_kv` leaves these
    (docs/quantisation.md)."""
    kernels: KernelSetting = AUTO
    """Implementation of every operation (docs/kernels.md). `auto` is eager on a CPU; on a GPU, the
    fastest that passed the check there. `eager` is plain PyTorch, `compile` torch.compile where an
    operation has a compiled version, `triton` demands its Triton kernel. A section sets single
    operations, as in {attention: eager}; the others are `auto`."""
    fit_to_memory: bool = False
    """Choose parallel.recompute, parallel.offload and, without a pipeline, data.micro_batch_size
    for the device's memory; the config's values of these are not used (docs/planning.md)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What a process computes on: `auto` is a GPU where the host has one, else the CPU. A GPU that
    torch cannot use is an error unless this is `cpu`."""
    deterministic: bool = False
    """Refuse operations whose results can differ between runs."""
    start_from: PathText | None = None
    """Run folder or Hugging Face folder whose weights a run begins with, of the same sizes and with
    the same tokenizer; the optimizer state is new. Null: initial values."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    phases: tuple[PhaseConfig, ...] = ()
    """Parts of the run with their own rows, attention and rates (docs/recipe.md). Without phases,
    the indexers are not trained: they keep their initial values."""
    post: PostConfig | None = None
    """Training on the model's own answers to prompts, in place of the rows of `data.shards`, whose
    validation text is still evaluated; null trains on the shards."""
    stability: StabilityConfig = StabilityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()
    _segment: int = PrivateAttr(default=0)

    @cached_property
    def recipe(self) -> Recipe:
        """The settings of every step, resolved once; `recipe.steps` is the length of the run."""
        return Recipe(self)

    @property
    def segment(self) -> Segment:
        """The phases that these processes train, with their degrees: the first ones by default."""
        return self.recipe.segments[self._segment]

    def at_step(self, step: int) -> Self:
        """Returns the same run, whose `segment` is that of a step."""
        copy = self.model_copy()
        copy._segment = self.recipe.segment_at(step).number
        return copy

    @property
    def checkpoints(self) -> AnyPath:
        """Where the run's checkpoints are."""
        folder = self.checkpoint.folder
        return self.run_dir / "checkpoints" if folder is None else as_path(folder)

    @property
    def written_folders(self) -> list[AnyPath]:
        """The folders that only one process may write into: the run's, that of checkpoints."""
        return [self.run_dir] + ([] if self.checkpoint.folder is None else [self.checkpoints])

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint. Raises as `is_complete`."""
        return bool(self._published())

    @property
    def last_checkpoint(self) -> AnyPath:
        """The checkpoint of the last step, which exists only once the run is complete."""
        return self.checkpoints / folder_name(self.recipe.steps)

    @property
    def may_save_async(self) -> bool:
        """Whether checkpoints are written beside training where the host has the memory."""
        return self.engine == "native" and self.checkpoint.mode != "sync"

    @property
    def is_complete(self) -> bool:
        """Whether the newest checkpoint is that of the last step.

        Raises ConfigError where there is no such bucket or no access to it, OSError where the
        storage is away.
        """
        saved = self._published()
        return bool(saved) and saved[-1] == self.last_checkpoint

    def _published(self) -> list[AnyPath]:
        try:
            return published(self.checkpoints)
        except (FileNotFoundError, PermissionError) as error:
            if isinstance(self.checkpoints, Path):
                raise
            raise ConfigError(
                f"checkpoint.folder = {self.checkpoints}: {error.strerror}; create it, correct the "
                "name, or give this user access"
            ) from None

    def kernel_setting(self, operation: str) -> str:
        """Returns what `kernels` asks for an operation: "auto" or an implementation."""
        return setting_of(self.kernels, operation)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for problem in phase_problems(self):
            raise ValueError(problem)
        for problem in run_problems(self, self.recipe):
            raise ValueError(problem)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copies as pydantic does; the copy resolves its own recipe."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("recipe", None)
        return copy

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError if the run cannot be spread over this many processes.

        Data-parallel ranks need not divide the rows: they get filler rows, which do not count. With
        a pipeline, the rows of a rank have to be whole microbatches.
        """
        if absent := [rank for rank in self.profile.ranks if rank >= world_size]:
            raise ConfigError(
                f"profile.ranks has {absent[0]}, and the last rank is {world_size - 1}"
            )
        for segment in self.recipe.segments:
            for problem in self._world_problems(segment, world_size):
                raise ConfigError(name_phase(self, segment, problem))

    def _world_problems(self, segment: Segment, world_size: int) -> Iterator[str]:
        yield from segment.parallel.world_problems(world_size)
        for where, rows in rows_of(self, segment):
            yield from segment.parallel.step_problems(world_size, rows, where)

    @property
    def min_world(self) -> int:
        """The smallest number of processes that the degrees of all phases divide."""
        return math.lcm(*(segment.parallel.min_world for segment in self.recipe.segments))

    def degrees(self, world_size: int) -> Degrees:
        """Returns the degrees of `segment` on all axes. Raises ConfigError as `check_world`."""
        self.check_world(world_size)
        return self.segment.parallel.degrees(world_size)

    def alone(self) -> Self:
        """Returns the same run on one process, without DeepSpeed, and with `kernels` = auto."""
        alone = {"parallel": ParallelConfig(), "engine": "native", "deepspeed": None}
        alone |= {"kernels": AUTO, "profile": ProfileConfig()}
        alone["phases"] = tuple(p.model_copy(update={"parallel": None}) for p in self.phases)
        return self.model_copy(update=alone).at_step(0)

    def with_absolute_paths(self) -> Self:
        """Returns the same run with paths that mean the same from any working directory."""
        data = self.data
        sources = tuple(source.with_absolute_paths() for source in data.sources)
        path = absolute(data.tokenizer.path)
        tokenizer = data.tokenizer.model_copy(update={"path": path})
        shards = absolute(data.shards)
        checkpoint = self.checkpoint
        if checkpoint.folder is not None:
            checkpoint = checkpoint.model_copy(update={"folder": absolute(checkpoint.folder)})
        update: dict[str, Any] = {"sources": sources, "tokenizer": tokenizer, "shards": shards}
        if data.cache.folder is not None:
            folder = absolute(data.cache.folder)
            update["cache"] = data.cache.model_copy(update={"folder": folder})
        if data.filters is not None:
            update["filters"] = data.filters.with_absolute_paths()
        run_dir = self.run_dir.absolute()
        post = None if self.post is None else self.post.with_absolute_paths()
        return self.model_copy(
            update={
                "run_dir": run_dir,
                "data": data.model_copy(update=update),
                "checkpoint": checkpoint,
                "post": post,
                "start_from": None if self.start_from is None else absolute(self.start_from),
                "evaluation": self.evaluation.with_absolute_paths(),
            }
        )

    def check_token_ids(self, tokens: TokenIds, place: str) -> None:
        """Raises ConfigError if the model lacks an embedding, or has other special ids.

        `place` is where `tokens`, a tokenizer or a manifest of shards, are defined.
        """
        if tokens.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {self.model.vocab_size} should be at least the "
                f"{tokens.vocab_size} ids of {place}"
            )
        for name, value in (
            ("bos_token_id", tokens.bos_id),
            ("eos_token_id", tokens.eos_id),
            ("pad_token_id", tokens.pad_id),
        ):
            if (ours := getattr(self.model, name)) != value:
                raise ConfigError(f"model.{name} = {ours} should be {value}, as in {place}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values as in YAML or JSON, with the number of steps resolved."""
        return self.model_dump(mode="json") | {"steps": self.recipe.steps}

    def to_yaml(self) -> str:
        """Returns the resolved config as YAML, itself a valid config file."""
        return dump_yaml(self.to_dict())

    def digest(self) -> str:
        """Returns the SHA-256 of all values, in hexadecimal."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_config(
    path: str | Path, overrides: Iterable[str] = (), defaults: Defaults | None = None
) -> RunConfig:
    """Reads a config file with its bases and `key.sub=value` overrides.

    `defaults` are values of keys that neither the files nor the overrides have.

    Raises ConfigError: one sentence with the file (or "command line"), the dotted key, the remedy,
    and the nearest name for a key that does not exist.
    """
    return load_as(RunConfig, path, overrides, defaults)


def load_as(
    root: type[Root],
    path: str | Path,
    overrides: Iterable[str] = (),
    defaults: Defaults | None = None,
) -> Root:
    """Reads a config file with another root in the same way, with the same errors."""
    source = read_source(Path(path), overrides, defaults)
    drop_unset(source.values)
    try:
        # Strict JSON reading: no "10" for 10 and no true for 1, yet lists become tuples and
        # strings become paths.
        return root.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        raise explain(error, root, source) from None


def load_run(
    path: str | Path, overrides: Iterable[str] = (), defaults: Defaults | None = None
) -> RunConfig:
    """Reads the config of a run folder, or a config file; `defaults` as in `load_config`.

    `run_dir` of the result is the folder that was named, whatever its `config.yaml` has: a run can
    be copied, renamed, linked to, or used from any working directory.

    Raises ConfigError, also if the folder has no `config.yaml`, if the command line has another
    `run_dir`, or if a file is the `config.yaml` of a run folder and has the `run_dir` of another.
    """
    path, overrides = Path(path), list(overrides)
    has_run_dir = any(text.partition("=")[0] == "run_dir" for text in overrides)
    if not path.is_dir():
        config = load_config(path, overrides, defaults)
        folder = path.parent
        is_saved = path.name == CONFIG_FILE and any((folder / name).exists() for name in _OUTPUTS)
        if is_saved and not has_run_dir and not _is_same_folder(folder, config.run_dir):
            raise ConfigError(
                f"{path}: is the config of a run in {folder}, and has run_dir = {config.run_dir}; "
                f"name the folder {folder}, or set run_dir=FOLDER on the command line"
            )
        return config
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(f"{path}: no run folder, since it has no {CONFIG_FILE}")
    config = load_config(path / CONFIG_FILE, overrides, defaults)
    if has_run_dir and not _is_same_folder(path, config.run_dir):
        raise ConfigError(
            f"{COMMAND_LINE}: run_dir = {config.run_dir} is not the run folder that is named, "
            f"{path}; omit it, or name {path / CONFIG_FILE} to start another run with this config"
        )
    return config.model_copy(update={"run_dir": path})


def is_hf_folder(path: str | Path) -> bool:
    """Whether a path is a Hugging Face folder, and no run folder."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / CONFIG_FILE).is_file()


def _is_same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
