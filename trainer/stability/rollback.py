"""Rolling back after a spike (report §4.2.3).

A step is judged between its backward and its update, by its metrics on the host. If it is a spike
there is no update: weights, optimizer and counters are restored from a snapshot of some steps ago
in memory, or from a checkpoint where there is no snapshot, and for a while experts are selected
with older weights (anticipation.py). A batch whose step is a spike a second time is skipped
(`skip_bad_batches`). Snapshots are taken before every `snapshot_every`-th step. All ranks judge by
the same metrics, so all decide the same without communication.

Where steps were skipped because loss or gradients were not finite, the update before them may have
ruined the weights. No snapshot is taken then, and what is restored is from before that update.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint import RunCheckpoint, checkpoints_in, step_of
from trainer.config import RunConfig
from trainer.metrics import Event
from trainer.process.errors import SaveError
from trainer.stability.anticipation import Anticipation
from trainer.stability.spikes import SpikeDetector
from trainer.state import TrainState
from trainer.step import StepResult

_KEPT_FIELDS = ("failed_saves", "rollbacks", "spike_steps", "skipped_batches")
"""Fields of the state that a rollback does not restore."""


@dataclass
class Snapshot:
    """All tensors of this rank at the beginning of a step, on the host, and the counters."""

    tensors: list[Tensor]
    optimizer_steps: int
    state: TrainState


class Snapshots:
    """The newest snapshot that is at least `min_age` steps old, and all newer ones.

    Arguments:
        every: steps between snapshots; 0 takes none.
        min_age: minimum number of steps that a rollback undoes.
    """

    def __init__(self, checkpoint: RunCheckpoint, every: int, min_age: int) -> None:
        self.checkpoint, self.every, self.min_age = checkpoint, every, min_age
        self._snapshots: list[Snapshot] = []
        self._is_first = True

    def before_step(self, state: TrainState) -> None:
        """Takes a snapshot before the first step and every `every` steps.

        None while steps are skipped. Does not wait for the copies.
        """
        if state.skipping_since is not None:
            return
        due = self.every and (state.step % self.every == 0 or self._is_first)
        if not due or (self._snapshots and self._snapshots[-1].state.step == state.step):
            return
        self._is_first = False
        reusable = None
        while len(self._snapshots) > 1 and self._snapshots[1].state.step <= self.limit(state):
            reusable = self._snapshots.pop(0).tensors
        live_tensors = self.checkpoint.live_tensors()
        copies = [_empty_on_host(t) for t in live_tensors] if reusable is None else reusable
        for host_copy, tensor in zip(copies, live_tensors, strict=True):
            host_copy.copy_(tensor, non_blocking=True)
        steps = self.checkpoint.optimizer.step_count
        self._snapshots.append(Snapshot(copies, steps, copy.deepcopy(state)))

    def restore(self, state: TrainState) -> bool:
        """Restores the newest that is old enough and drops those after it; False for none."""
        while self._snapshots and self._snapshots[-1].state.step > self.limit(state):
            self._snapshots.pop()
        if not self._snapshots:
            return False
        snapshot = self._snapshots[-1]
        live_tensors = self.checkpoint.live_tensors()
        for host_copy, tensor in zip(snapshot.tensors, live_tensors, strict=True):
            tensor.copy_(host_copy, non_blocking=True)
        self.checkpoint.optimizer.restored()
        self.checkpoint.optimizer.step_count = snapshot.optimizer_steps
        state.restore(snapshot.state.to_dict())
        return True

    def limit(self, state: TrainState) -> int:
        """Returns the newest step that a run in this state may roll back to."""
        limit = state.step - self.min_age
        if state.skipping_since is not None:
            limit = min(limit, state.skipping_since - 1)  # before the last update
        return limit


def _empty_on_host(tensor: Tensor) -> Tensor:
    """Host memory for a tensor; page-locked for a GPU, which then copies without the CPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).contiguous()


class Stability:
    """Judges the steps of a run and rolls it back; idle where `stability.spikes` is null."""

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
            every, min_age = self.settings.snapshot_every, self.settings.min_rollback_steps
            self.snapshots = Snapshots(checkpoint, every, min_age)

    def before_step(self) -> None:
        """Takes a snapshot where one is due; every rank calls it before every step."""
        if self.settings is not None:
            self.snapshots.before_step(self.state)

    def problem(self, result: StepResult) -> str | None:
        """Returns why a step with finite metrics is a spike, or None."""
        if self.settings is None:
            return None
        metrics = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "max_expert_share": result.max_expert_share,
        }
        first = self.hash_layers
        metrics |= {f"router {n}": x for n, x in enumerate(result.top1_weight_share, first)}
        return self.detector.problem(self.state.history, metrics)

    def roll_back(self, problem: str) -> Event:
        """Undoes the last steps because the current one has this problem.

        Returns what was done. Where there is nothing to restore, or the run has rolled back too
        often, the run has to end: a checkpoint is saved, unless its weights may be ruined, and
        `stop_reason` is set.
        """
        settings, state = self.settings, self.state
        assert settings is not None
        spike, is_spent = state.step, state.rollbacks >= settings.max_rollbacks
        self.checkpoint.finish()
        is_restored, stop_reason, save_problem = self._restore(), None, None
        if not is_restored:
            stop_reason = (
                "there is neither a snapshot nor a checkpoint at least "
                f"stability.spikes.min_rollback_steps = {settings.min_rollback_steps} steps old to "
                "restore"
            )
        elif is_spent:
            stop_reason = (
                "the run has rolled back stability.spikes.max_rollbacks = "
                f"{settings.max_rollbacks} times already"
            )
        self.anticipation.restart(state)
        if stop_reason is not None:
            stop_reason += f"; {self._save_at_end(is_restored)}"
        else:
            state.rollbacks += 1
            self._record_spike(spike)
            self._start_anticipation()
            save_problem = self._remove_later_checkpoints()
        return {
            "spike_step": spike + 1,
            "reason": problem,
            "restored_step": state.step if is_restored else None,
            "rollbacks": state.rollbacks,
            "skipped_batch": spike + 1 if spike in state.skipped_batches else None,
            # state.anticipation_end is exclusive, from 0: the last routed step, counted from 1.
            "anticipation_end": None if stop_reason else self._anticipation_end(),
            "stop_reason": stop_reason,
            "save_problem": save_problem,
        }

    def _restore(self) -> bool:
        """Restores a snapshot or a checkpoint that is old enough; False where there is none."""
        assert self.settings is not None
        state = self.state
        kept_fields = {name: copy.deepcopy(getattr(state, name)) for name in _KEPT_FIELDS}
        limit = self.snapshots.limit(state)
        is_restored = self.snapshots.restore(state)
        if not is_restored:
            is_restored = self.checkpoint.load(state, before=limit + 1) is not None
        if is_restored:
            for name, value in kept_fields.items():
                setattr(state, name, value)
        return is_restored

    def _record_spike(self, step: int) -> None:
        """Records a spike; skips the step's batch if the step was a spike before.

        Then the batch is the cause.
        """
        assert self.settings is not None
        state = self.state
        if self.settings.skip_bad_batches and step in state.spike_steps:
            state.skipped_batches = sorted({*state.skipped_batches, step})
        state.spike_steps = sorted({*state.spike_steps, step})

    def _start_anticipation(self) -> None:
        """Routes by older weights for a while, where the config wants it after spikes."""
        state, routing = self.state, self.routing
        if routing.when == "after_spikes":
            state.anticipation_start = state.step
            state.anticipation_end = state.step + routing.active_steps

    def _anticipation_end(self) -> int | None:
        state = self.state
        return state.anticipation_end if state.anticipatory_routing_at(state.step) else None

    def _save_at_end(self, is_restored: bool) -> str:
        """Saves the last state of a run that ends, if it is sound; returns a clause about it."""
        since = self.state.skipping_since
        if not is_restored and since is not None:
            return f"nothing is saved; {self.checkpoint.newest_before(since + 1)}"
        try:
            return f"saved {self.checkpoint.save(self.state, reuse=True)}"
        except SaveError as error:
            return str(error)

    def _remove_later_checkpoints(self) -> str | None:
        """Removes checkpoints of steps that are undone: a restart would resume from them.

        Returns the reason where the restored state, which replaces them, could not be saved. Then
        they stay until the next checkpoint.
        """
        folder = self.checkpoint.folder.folder
        if any(step_of(path) > self.state.step for path in checkpoints_in(folder)):
            try:
                self.checkpoint.save(self.state, reuse=True)
            except SaveError as error:
                return str(error)
        return None
