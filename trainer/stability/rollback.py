"""Spikes: seen on the host's numbers of a step, undone by turning back a little (report 4.2.3).

A step is judged between its backward and its update. If it is a spike there is no update: weights,
optimizer and counters are set back to a snapshot of some steps ago, in memory or, where there is
none, to a checkpoint, and for a while experts are chosen with older weights (anticipation.py). A
batch at whose step a spike comes a second time is left out. A snapshot is taken now and then before
a step. All ranks judge by the same numbers, so all do the same without a word.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.folder import checkpoints_in, step_of
from trainer.checkpoint.run import RunCheckpoint
from trainer.config import RunConfig
from trainer.metrics.jsonl import Event
from trainer.stability.anticipation import Anticipation
from trainer.stability.spikes import SpikeDetector
from trainer.state import TrainState
from trainer.step import StepResult

# What a run remembers when it turns back.
_KEPT = ("rollbacks", "suspects", "left_out")


@dataclass
class Snapshot:
    """All tensors of this rank at the beginning of a step, on the host, and the counters."""

    tensors: list[Tensor]
    optimizer_steps: int
    state: TrainState


class Snapshots:
    """The newest snapshot that is old enough to turn back to, and the newer ones."""

    def __init__(self, checkpoint: RunCheckpoint, every: int, least: int) -> None:
        self.checkpoint, self.every, self.least = checkpoint, every, least
        self._held: list[Snapshot] = []
        self._begun = False

    def before_step(self, state: TrainState) -> None:
        """Take one where it is due, before the first step and every so many. Waits for nothing."""
        due = self.every and (state.step % self.every == 0 or not self._begun)
        if not due or (self._held and self._held[-1].state.step == state.step):
            return
        self._begun = True
        free = None
        while len(self._held) > 1 and self._held[1].state.step <= state.step - self.least:
            free = self._held.pop(0).tensors
        live = self.checkpoint.live_tensors()
        tensors = [_room(tensor) for tensor in live] if free is None else free
        for held, tensor in zip(tensors, live, strict=True):
            held.copy_(tensor, non_blocking=True)
        steps = self.checkpoint.optimizer.step_count
        self._held.append(Snapshot(tensors, steps, copy.deepcopy(state)))

    def restore(self, state: TrainState) -> bool:
        """Go back to the newest that is old enough, and drop those after it; False for none."""
        while self._held and self._held[-1].state.step > state.step - self.least:
            self._held.pop()
        if not self._held:
            return False
        snapshot = self._held[-1]
        live = self.checkpoint.live_tensors()
        for held, tensor in zip(snapshot.tensors, live, strict=True):
            tensor.copy_(held, non_blocking=True)
        self.checkpoint.optimizer.restored()
        self.checkpoint.optimizer.step_count = snapshot.optimizer_steps
        state.go_on_from(snapshot.state.saved())
        return True


def _room(tensor: Tensor) -> Tensor:
    """Memory of the host for a tensor; from page-locked one a GPU copies by itself."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).contiguous()


class Stability:
    """Judges the steps of a run and turns it back; nothing where `stability.spikes` is null."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        checkpoint: RunCheckpoint,
        anticipation: Anticipation,
    ) -> None:
        self.settings = config.stability.spikes
        self.routing = config.stability.anticipatory_routing
        self.hash_layers = config.model.num_hash_layers
        self.state, self.checkpoint, self.anticipation = state, checkpoint, anticipation
        if self.settings is not None:
            self.detector = SpikeDetector(self.settings)
            every, least = self.settings.snapshot_every, self.settings.min_rollback_steps
            self.snapshots = Snapshots(checkpoint, every, least)

    def before_step(self) -> None:
        """Every rank calls it before a step, also before one that is left out."""
        if self.settings is not None:
            self.snapshots.before_step(self.state)

    def problem(self, result: StepResult) -> str | None:
        """Why a step with finite numbers is a spike, in words, or None."""
        if self.settings is None:
            return None
        numbers = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "busiest": result.busiest_share,
        }
        first = self.hash_layers
        numbers |= {f"router {n}": share for n, share in enumerate(result.first_share, first)}
        return self.detector.problem(self.state.history, numbers)

    def turn_back(self, problem: str) -> Event:
        """Undo the last steps because of what was seen in the present one.

        What was done. Where there is nothing to turn back to, or the run has turned back too often,
        it is to stop: a checkpoint is saved, and `stopped` says why.
        """
        settings, state = self.settings, self.state
        assert settings is not None
        seen, spent = state.step, state.rollbacks >= settings.max_rollbacks
        back, stopped = self._go_back(), None
        if not back:
            stopped = (
                "there is neither a snapshot nor a checkpoint at least stability.spikes.min_rollback_steps = "
                f"{settings.min_rollback_steps} steps old to turn back to"
            )
        elif spent:
            stopped = (
                f"the run has turned back stability.spikes.max_rollbacks = {settings.max_rollbacks}"
                " times already"
            )
        self.anticipation.begin_anew(state)
        if stopped is not None:
            stopped += f"; saved {self.checkpoint.save(state, last=True)}"
        else:
            state.rollbacks += 1
            self._suspect(seen)
            self._anticipate()
            self._forget_later_checkpoints()
        return {
            "seen_at": seen + 1,
            "what": problem,
            "back_to": state.step if back else None,
            "rollbacks": state.rollbacks,
            "left_out": seen + 1 if seen in state.left_out else None,
            "anticipation_until": None if stopped else self._until(),
            "stopped": stopped,
        }

    def _go_back(self) -> bool:
        """Restore a snapshot or a checkpoint that is old enough; False where there is none."""
        assert self.settings is not None
        state = self.state
        kept = {name: copy.deepcopy(getattr(state, name)) for name in _KEPT}
        limit = state.step - self.settings.min_rollback_steps
        done = self.snapshots.restore(state)
        if not done:
            done = self.checkpoint.load(state, before=limit + 1) is not None
        if done:
            for name, value in kept.items():
                setattr(state, name, value)
        return done

    def _suspect(self, step: int) -> None:
        """Leave a step's batch out if it was suspected before: then it is the batch's fault."""
        assert self.settings is not None
        state = self.state
        if self.settings.skip_bad_batches and step in state.suspects:
            state.left_out = sorted({*state.left_out, step})
        state.suspects = sorted({*state.suspects, step})

    def _anticipate(self) -> None:
        """Choose with older weights from here on, for a while."""
        state, routing = self.state, self.routing
        if routing.when == "after_spikes":
            state.anticipation_since = state.step
            state.anticipation_until = state.step + routing.active_steps

    def _until(self) -> int | None:
        state = self.state
        return state.anticipation_until if state.anticipates(state.step) else None

    def _forget_later_checkpoints(self) -> None:
        """Checkpoints of steps that are undone would be resumed from: none may stay."""
        folder = self.checkpoint.folder.folder
        if any(step_of(path) > self.state.step for path in checkpoints_in(folder)):
            self.checkpoint.save(self.state, last=True)
