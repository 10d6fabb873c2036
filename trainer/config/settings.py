"""Protocols with the fields of a run's config that its recipe and checks read. Imports no torch.

`RunConfig` has all of them. A module that takes one of these instead of `RunConfig` can be imported
by it.
"""

from typing import Any, Protocol

from data.config import DataConfig
from model.config import ModelConfig
from optim.config import OptimConfig
from trainer.config.evaluation import EvaluationConfig
from trainer.config.operation import ProfileConfig
from trainer.config.parallel import ParallelConfig
from trainer.config.phases import PhaseConfig, Quantisation
from trainer.config.post import PostConfig
from trainer.config.stability import StabilityConfig


class RecipeSettings(Protocol):
    """What a recipe is resolved from."""

    @property
    def steps(self) -> int:
        """Steps as written: 0 where they follow from the phases."""

    @property
    def phases(self) -> tuple[PhaseConfig, ...]: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def optim(self) -> OptimConfig: ...

    @property
    def mtp_loss_weight_in_decay(self) -> float | None: ...

    @property
    def router_bias_speed(self) -> float: ...

    @property
    def quantisation(self) -> Quantisation: ...

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def post(self) -> PostConfig | None: ...


class SaveSettings(Protocol):
    """How checkpoints are written."""

    @property
    def mode(self) -> str: ...


class RunSettings(RecipeSettings, Protocol):
    """What the checks across sections read."""

    @property
    def precision(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def start_from(self) -> str | None: ...

    @property
    def deepspeed(self) -> dict[str, Any] | None: ...

    @property
    def fit_to_memory(self) -> bool: ...

    @property
    def stability(self) -> StabilityConfig: ...

    @property
    def checkpoint(self) -> SaveSettings: ...

    @property
    def evaluation(self) -> EvaluationConfig: ...

    @property
    def profile(self) -> ProfileConfig: ...
