"""The root of a run's configuration, and how it is read. Imports no torch.

    config = load_config("configs/debug.yaml", ["steps=20", "data.global_batch_size=8"])

Unknown keys, wrong types and values that do not fit together raise ConfigError with one sentence.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from data.config import DataConfig
from model.config import ModelConfig
from optim.config import OptimConfig
from trainer.config.checks import phase_problems, rows_of, run_problems
from trainer.config.explain import explain
from trainer.config.parallel import ParallelConfig
from trainer.config.phases import PhaseConfig, Quantisation
from trainer.config.recipe import Recipe
from trainer.config.section import Section
from trainer.config.source import ConfigError, dump_yaml, read_source
from trainer.config.stability import StabilityConfig
from trainer.parallel.degrees import Degrees

Root = TypeVar("Root", bound=BaseModel)


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints; 0 writes only the last one (and one on SIGTERM or SIGINT)."""
    keep: NonNegativeInt = 3
    """How many of the newest stay; 0 keeps all."""


class WandbConfig(Section):
    """Weights & Biases. The API key comes from wandb's own login and is never written by us."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where a key is found, else offline (`wandb sync` sends it later)."""
    project: str = "v4-pretrain"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class MetricsConfig(Section):
    """What is reported. `metrics.jsonl` has one object for every step in any case."""

    every: PositiveInt = 1
    """Steps between plain progress lines, and between points sent to wandb."""
    layer_stats_every: NonNegativeInt = 100
    """Steps between looks at every layer (loads of experts, router biases, sinks, streams, SwiGLU)
    and at how far weights move, which run one microbatch forward once more, copy the weights to the
    host and wait for the device; 0 looks only after the last step."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s; with it `mfu` is reported. Null is bf16's of the data sheet,
    where precision is bf16 or fp8 and the GPU a known one."""
    wandb: WandbConfig = WandbConfig()


class EvaluationConfig(Section):
    """Loss on the validation split during training."""

    every: NonNegativeInt = 1000
    """Steps between evaluations; 0 evaluates only after the last step."""
    max_rows: PositiveInt | None = None
    """Validation rows that are read; null reads all of them."""
    per_source: bool = True
    """Also the loss of every source by itself, where there are several, on as many rows in all."""


class RunConfig(Section):
    """A whole run. Fields are the interface of config files and of the command line."""

    run_dir: Path
    """The run's folder: config.yaml, metrics.jsonl, checkpoints/, wandb/, report.html."""
    steps: NonNegativeInt = 0
    """Optimizer steps of the whole run, those before a resume included; with `phases` they follow
    from the phases' tokens."""
    seed: NonNegativeInt = 0
    """Decides initial weights and data order."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """`bf16` computes in bfloat16, with fp32 master weights in the optimizer. `fp8` is bf16 with
    the factors of linears' and experts' products rounded to eight bits (docs/quantisation.md)."""
    engine: Literal["native", "deepspeed"] = "native"
    """`deepspeed` leaves gradients and optimizer to DeepSpeed and its ZeRO stages."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own settings, in its format; see docs/deepspeed.md."""
    mtp_loss_weight_in_decay: NonNegativeFloat | None = 0.1
    """MTP loss weight once the learning rate decays (REP 4.2); null keeps model.mtp_loss_weight."""
    router_bias_speed: NonNegativeFloat = 0.001
    """How far a router's bias moves a step, against the load (V3 2.1.2; V4's own value)."""
    quantisation: Quantisation = "none"
    """`mxfp4` trains routed experts and the indexer's queries and keys for four bits (REP 3.4)."""
    compile: bool = False
    """Run norms, experts' activation and residual streams, where no Triton kernel does, through
    torch.compile (docs/performance.md)."""
    fit_to_memory: bool = False
    """Choose data.micro_batch_size, parallel.recompute and parallel.offload for the memory of the
    device that training finds, in place of what is written (docs/planning.md)."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    phases: tuple[PhaseConfig, ...] = ()
    """Parts of the run with their own rows, attention and rates; without any it is one part, whose
    indexers choose as they were made and are not trained."""
    stability: StabilityConfig = StabilityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @cached_property
    def recipe(self) -> Recipe:
        """What the run does at every step; `recipe.steps` are the steps of the whole run."""
        return Recipe(self)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for problem in phase_problems(self):
            raise ValueError(problem)
        for problem in run_problems(self, self.recipe):
            raise ValueError(problem)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's; the copy resolves its own recipe."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("recipe", None)
        return copy

    def check_world(self, world_size: int) -> None:
        """Raise ConfigError when the run cannot be spread over this many processes.

        Without a pipeline, data-parallel ranks need not divide the rows: filler rows, which count
        nothing, even them out.
        """
        for problem in self.parallel.world_problems(world_size):
            raise ConfigError(problem)
        for where, rows in rows_of(self, self.recipe):
            for problem in self.parallel.step_problems(world_size, rows, where):
                raise ConfigError(problem)

    def degrees(self, world_size: int) -> Degrees:
        """Degrees of all axes for this many processes. Raises ConfigError as `check_world`."""
        self.check_world(world_size)
        return self.parallel.degrees(world_size)

    def alone(self) -> Self:
        """The same run on one process, without DeepSpeed and torch.compile."""
        alone = {"parallel": ParallelConfig(), "engine": "native", "deepspeed": None}
        alone["compile"] = False
        return self.model_copy(update=alone)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError when the tokenizer has ids that the model has no embedding for."""
        if vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {self.model.vocab_size} should be at least the {vocab_size} "
                f"ids of the tokenizer in data.tokenizer.path = {self.data.tokenizer.path}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in YAML or JSON, with the number of steps resolved."""
        return self.model_dump(mode="json") | {"steps": self.recipe.steps}

    def to_yaml(self) -> str:
        """The resolved config, itself a valid config."""
        return dump_yaml(self.to_dict())

    def digest(self) -> str:
        """SHA-256 of all values, in hexadecimal."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a config file with its bases and `key.sub=value` overrides.

    Raises ConfigError: one sentence with the file (or "command line"), the dotted key, and what
    would be right, with the nearest name for a key that does not exist.
    """
    return load_as(RunConfig, path, overrides)


def load_as(root: type[Root], path: str | Path, overrides: Iterable[str] = ()) -> Root:
    """Read a file of another kind in the same way, with the same errors, as `root`."""
    source = read_source(Path(path), overrides)
    try:
        # Strict JSON reading: no "10" for 10 and no true for 1, yet lists become tuples and
        # strings become paths.
        return root.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        raise explain(error, root, source) from None


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of a run, given its folder or a config file.

    Raises ConfigError, also when the folder holds no `config.yaml`.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path}: no run folder, since it holds no config.yaml")
        return load_config(path / "config.yaml", overrides)
    return load_config(path, overrides)
