"""What a run saves in a checkpoint and how it goes on from one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from model import V4Model
from optim import StatePiece
from trainer.checkpoint.folder import (
    CheckpointFolder,
    check_model,
    checkpoints_in,
    model_digest,
    read_state,
)
from trainer.checkpoint.logical_tensors import Parts, logical_tensors
from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.parallel.grid import Grid
from trainer.parallel.placement import Placement
from trainer.stability.anticipation import Anticipation
from trainer.state import TrainState


class Updater(Protocol):
    """What a checkpoint needs of an optimizer; optim.HybridZero says what each is."""

    step_count: int

    def states(self) -> Iterator[StatePiece]:
        """What this rank keeps; to restore, copy into the tensors of the newest call."""

    def restored(self) -> None:
        """Take over what was copied into them."""


def newest_of(
    config: RunConfig, folder: CheckpointFolder, tokenizer_hash: str, before: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint, verified, and its `state.json`; None where there is none.

    With `before`, the newest of those with a lower step.

    Raises CheckpointError for a damaged checkpoint and for one of another model, seed or
    tokenizer, naming the field.
    """
    path = folder.newest(before)
    if path is None:
        return None
    saved = read_state(path)
    check_model(path, saved["model"], config.model.model_dump(mode="json"))
    for field, ours, what in (
        ("seed", config.seed, "seed"),
        ("tokenizer", tokenizer_hash, "data.tokenizer.path"),
    ):
        if saved[field] != ours:
            raise CheckpointError(
                f"{path}: was trained with another {what}: {saved[field]!r} there and "
                f"{ours!r} in this run"
            )
    return path, saved


class RunCheckpoint:
    """Saves and restores model, optimizer and counters of one run.

    `placements` say which parts of the model's tensors are here; by default they are whole.
    Without an `anticipation` the choices of experts that wait in a checkpoint are left there.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        model: V4Model,
        optimizer: Updater,
        tokenizer_hash: str,
        placements: Mapping[str, Placement] | None = None,
        anticipation: Anticipation | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.tokenizer_hash = tokenizer_hash
        self.placements = placements
        self.anticipation = anticipation
        self.folder = CheckpointFolder(config.run_dir / "checkpoints", grid, config.checkpoint.keep)

    def save(self, state: TrainState, last: bool = False) -> Path:
        """Publish a checkpoint of the present state. Raises SaveError.

        With `last`, those of later steps go, which are of steps that were undone, and one of this
        step may be there already and then stays.
        """
        tensors = self._tensors()
        if self.anticipation is not None:
            tensors |= self.anticipation.parts()
        return self.folder.save(state.step, tensors, self._document(state), last)

    def live_tensors(self) -> list[Tensor]:
        """All tensors of model and optimizer that are here, always in the same order."""
        return [part.tensor for parts in self._tensors().values() for part in parts]

    def load(self, state: TrainState, before: int | None = None) -> Path | None:
        """Go on from the newest checkpoint, if there is one: fills model, optimizer and `state`.

        With `before`, from the newest of those with a lower step.

        Raises CheckpointError for a damaged checkpoint and for one of another model, seed or
        tokenizer, naming the field.
        """
        found = newest_of(self.config, self.folder, self.tokenizer_hash, before)
        if found is None:
            return None
        path, saved = found
        state.go_on_from(saved)
        tensors = self._tensors()
        if self.anticipation is not None:
            tensors |= self.anticipation.restore(saved.get("anticipation"), state)
        self.folder.load(path, tensors)
        self.optimizer.restored()
        self.optimizer.step_count = saved["optimizer_steps"]
        if state.step > self.config.steps:
            raise CheckpointError(
                f"{path}: is at step {state.step}, beyond steps = {self.config.steps} of the config"
            )
        return path

    def where_to_go_on(self) -> str:
        """A clause that names the newest checkpoint."""
        found = checkpoints_in(self.folder.folder)
        return f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def _tensors(self) -> Parts:
        return logical_tensors(self.model, self.optimizer.states(), self.placements)

    def _document(self, state: TrainState) -> dict[str, Any]:
        model = self.config.model.model_dump(mode="json")
        waiting = {} if self.anticipation is None else {"anticipation": self.anticipation.waiting()}
        return {
            **state.saved(),
            **waiting,
            "optimizer_steps": self.optimizer.step_count,
            "seed": self.config.seed,
            "tokenizer": self.tokenizer_hash,
            "config_digest": self.config.digest(),
            "model_digest": model_digest(model),
            "model": model,
        }
