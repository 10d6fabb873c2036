"""Saves a run in checkpoints and resumes it from one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from data import Loader
from data.held_lease import HeldLease
from data.storage import AnyPath
from model import V4Model
from optim import StateSlice
from trainer.checkpoint.background import BackgroundSaves, SaveReport
from trainer.checkpoint.folder import (
    CheckpointFolder,
    check_model,
    checkpoints_in,
    model_digest,
    read_state,
    step_of,
)
from trainer.checkpoint.logical_tensors import Boxes, live_slices, logical_tensors
from trainer.checkpoint.unsaved import record_newest
from trainer.config import RunConfig, changed_fields, replaced_optimizer
from trainer.parallel.grid import Grid
from trainer.parallel.placement import Placement
from trainer.process.errors import CheckpointError
from trainer.run_tokenizer import run_data
from trainer.state import TrainState


class SavedOptimizer(Protocol):
    """What a checkpoint needs of an optimizer; see optim.HybridZero."""

    step_count: int

    def states(self) -> Iterator[StateSlice]:
        """Returns the states on this rank; to restore, copy into the tensors of the last call."""

    def restored(self) -> None:
        """Takes over what was copied into them."""


class PendingSelections(Protocol):
    """What a checkpoint needs of anticipatory routing; see trainer/stability/anticipation.py."""

    def metadata(self) -> dict[str, Any]:
        """Returns what `state.json` records about the pending selections."""

    def boxes(self) -> Boxes:
        """Returns the pending selections of this rank."""

    def restore(self, saved: dict[str, Any] | None, state: TrainState) -> Boxes:
        """Allocates those of a checkpoint, to be loaded into, and updates `state`."""


class SavedData(Protocol):
    """What a checkpoint needs of the data; see data/rows/resume.py."""

    def save(self, step: int) -> dict[str, Any]:
        """Returns what `state.json` records about the data before a step."""

    def resume(self, saved: dict[str, Any] | None, step: int) -> list[str]:
        """Compares it with the data of this run and begins there; returns lines to log."""


def newest_of(
    config: RunConfig, folder: CheckpointFolder, tokenizer_hash: str, before: int | None = None
) -> tuple[AnyPath, dict[str, Any]] | None:
    """Returns the newest checkpoint, verified, and its `state.json`; None where there is none.

    With `before`, the newest of those with a lower step.

    Raises CheckpointError for a damaged checkpoint and for one of another model, seed or
    tokenizer, naming the field.
    """
    path = folder.newest(before)
    if path is None:
        return None
    saved = read_state(path)
    if saved["step"] != step_of(path):
        raise CheckpointError(f"{path}: is of step {saved['step']}; restore the folder's name")
    check_model(path, saved["model"], config.model.model_dump(mode="json"))
    if saved["seed"] != config.seed:
        raise CheckpointError(
            f"{path}: was trained with seed = {saved['seed']}, and this run's config has seed = "
            f"{config.seed}"
        )
    if saved["tokenizer"] != tokenizer_hash:
        raise CheckpointError(
            f"{path}: was trained with another tokenizer than the one in "
            f"{run_data(config).tokenizer.path} (SHA-256 {saved['tokenizer'][:12]}… there and "
            f"{tokenizer_hash[:12]}… here); put a copy of the former there"
        )
    return path, saved


def other_shards(config: RunConfig, loader: Loader) -> str:
    """Returns a sentence where the newest checkpoint was trained on other shards, else nothing.

    `loader` has those in use. Checkpoints before version 0.2 do not record theirs.
    """
    newest = checkpoints_in(config.checkpoints)[-1]
    trained_on = read_state(newest).get("data", {}).get("shards", loader.digest)
    if loader.has_shards(trained_on):
        return ""
    return (
        f"{config.data.shards} has been prepared again ({loader.digest[:16]}) since {newest} was "
        f"trained on it ({trained_on[:16]}): its validation text may be another"
    )


class RunCheckpoint:
    """Saves and restores model, optimizer and counters of one run.

    `placements` say which part of each of the model's tensors this rank holds; without them nothing
    is sharded. Without `anticipation`, pending selections in a checkpoint are ignored; without
    `data`, what it records about the data is.

    `leases` are checked before anything is published or removed.

    `changes` has lines about what a checkpoint that was loaded has otherwise than this run.
    `background` has the saves beside training, once `save_beside_training` was called.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        model: V4Model,
        optimizer: SavedOptimizer,
        tokenizer_hash: str,
        placements: Mapping[str, Placement] | None = None,
        anticipation: PendingSelections | None = None,
        data: SavedData | None = None,
        leases: Sequence[HeldLease] = (),
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.tokenizer_hash = tokenizer_hash
        self.placements = placements
        self.anticipation = anticipation
        self.data = data
        self.changes: list[str] = []
        self.background: BackgroundSaves | None = None
        self._in_flight: AnyPath | None = None
        """A checkpoint that is being written and not yet recorded as the newest."""
        self.folder = CheckpointFolder(config.checkpoints, grid, config.checkpoint.keep, leases)

    def save(self, state: TrainState, reuse: bool = False) -> AnyPath:
        """Publishes a checkpoint of the current state before it returns. Raises SaveError.

        Checkpoints of later steps, which were undone, are removed; older ones stay until `prune`.
        With `reuse`, one of this step that exists is kept.
        """
        self.finish()
        path = self.folder.save(state.step, self._all_boxes(), self._document(state), reuse)
        self.record_newest(path)
        return path

    def save_beside_training(self) -> None:
        """Lets `begin_save` write beside training. Raises OSError where memory is lacking."""
        self.background = BackgroundSaves(self.folder, self._all_boxes())

    def begin_save(self, state: TrainState) -> AnyPath:
        """Copies the current state for a checkpoint that is published some time later.

        Without `save_beside_training`, the same as `save`. Raises SaveError.
        """
        if self.background is None:
            return self.save(state)
        path = self.background.begin(state.step, self._all_boxes(), self._document(state))
        self._in_flight = path
        return path

    def finish(self) -> bool:
        """Waits for a save in flight; every rank calls it. False where it has failed."""
        is_published = self.background is None or self.background.finish()
        if is_published and self._in_flight is not None:
            self.record_newest(self._in_flight)
        self._in_flight = None
        return is_published

    def reports(self) -> list[SaveReport]:
        """Returns, once, what became of saves in the background; on the first rank alone."""
        reports = [] if self.background is None else self.background.reports()
        for report in reports:
            if report.problem is None and report.path == self._in_flight:
                self.record_newest(report.path)
                self._in_flight = None
        return reports

    def wait_at_end(self) -> None:
        """Gives a save in flight some seconds after an error. Not a collective call."""
        if self.background is not None:
            self.background.wait_at_end()

    def close(self) -> None:
        """Ends the saves in the background. Not a collective call."""
        if self.background is not None:
            self.background.close()

    def prune(self) -> str | None:
        """Removes old checkpoints once the newest is known to be sound; returns any problem.

        None while one is being written, which may fail.
        """
        if self.background is not None and self.background.is_writing:
            return None
        return self.folder.prune()

    def remove(self, checkpoint: AnyPath) -> str | None:
        """Removes a checkpoint that is not sound, on all ranks; returns any problem."""
        self.finish()
        problem = self.folder.remove(checkpoint)
        if problem is None and self.folder.grid.is_first:
            left = checkpoints_in(self.folder.folder)
            self.record_newest(left[-1] if left else None)
        return problem

    def record_newest(self, checkpoint: AnyPath | None) -> None:
        """Records the newest checkpoint in the run folder; see unsaved.py."""
        if self.folder.grid.is_first:
            record_newest(self.config, checkpoint)

    def live_tensors(self) -> list[Tensor]:
        """Returns all tensors of model and optimizer on this rank, always in the same order.

        Whole ones: a stack of experts is one tensor here, unlike in a checkpoint.
        """
        return [live.tensor for live in live_slices(self.model, self.optimizer.states())]

    def load(self, state: TrainState, before: int | None = None) -> AnyPath | None:
        """Restores model, optimizer and `state` from the newest checkpoint, if there is one.

        With `before`, from the newest of those with a lower step.

        Raises CheckpointError for a damaged checkpoint and for one of another model, seed or
        tokenizer, DataError for other rows, naming the field.
        """
        self.finish()
        newest = newest_of(self.config, self.folder, self.tokenizer_hash, before)
        if newest is None:
            return None
        path, saved = newest
        ours = self.config.to_dict()
        if clause := replaced_optimizer(saved.get("config"), ours):
            raise CheckpointError(f"{path}: {clause}")
        self.changes = changed_fields(saved.get("config"), ours)
        if self.data is not None:
            self.changes += self.data.resume(saved.get("data"), saved["step"])
        state.restore(saved)
        tensors = self._tensors()
        if self.anticipation is not None:
            tensors |= self.anticipation.restore(saved.get("anticipation"), state)
        self.folder.load(path, tensors)
        self.optimizer.restored()
        self.optimizer.step_count = saved["optimizer_steps"]
        if state.step > self.config.recipe.steps:
            raise CheckpointError(
                f"{path}: is at step {state.step}, beyond steps = {self.config.recipe.steps} of "
                "the config"
            )
        return path

    def newest_before(self, step: int) -> str:
        """Returns a clause that names the newest checkpoint from before a step with a failure.

        `step` is counted from 1. Where that checkpoint has the very weights with which the step
        failed, the one before it is named as well, and in any case those to remove. Every rank
        calls it.
        """
        self.finish()
        paths = checkpoints_in(self.folder.folder)
        earlier = [path for path in paths if step_of(path) < step]
        if not paths:
            return "there is no checkpoint yet"
        if not earlier:
            return f"there is no checkpoint from before step {step}"
        text = f"from before step {step}, the newest checkpoint is {earlier[-1]}"
        if step_of(earlier[-1]) == step - 1:
            previous = f"; the previous one is {earlier[-2]}" if len(earlier) > 1 else ""
            text += f" (saved right before it{previous})"
        if later := [path.name for path in paths if step_of(path) >= step]:
            text += f"; to resume from there, remove {', '.join(later)}"
        return text

    def _all_boxes(self) -> Boxes:
        pending = {} if self.anticipation is None else self.anticipation.boxes()
        return self._tensors() | pending

    def _tensors(self) -> Boxes:
        return logical_tensors(self.model, self.optimizer.states(), self.placements)

    def _document(self, state: TrainState) -> dict[str, Any]:
        model = self.config.model.model_dump(mode="json")
        pending = (
            {} if self.anticipation is None else {"anticipation": self.anticipation.metadata()}
        )
        data = {} if self.data is None else {"data": self.data.save(state.step)}
        return {
            **state.to_dict(),
            **pending,
            **data,
            "optimizer_steps": self.optimizer.step_count,
            "seed": self.config.seed,
            "tokenizer": self.tokenizer_hash,
            "config_digest": self.config.digest(),
            "config": self.config.to_dict(),
            "model_digest": model_digest(model),
            "model": model,
        }
