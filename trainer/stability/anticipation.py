"""Anticipatory routing: experts selected with the weights of some steps ago (report §4.2.3).

While it is on, step t trains with the weights of step t, but its tokens go to the experts that the
weights of step t - lag select for them; the present gate still weights the experts. So every step
fetches the batch of `lag` steps later, runs forward over it once, and keeps what the learned
routers select until then.

If it starts at step s, nothing was selected earlier: the experts of steps s to s + lag are all
selected with the weights of step s. So are those of a phase with other degrees that starts at step
s, if its rows do not divide over the processes of the phase before. Pending selections are part of
a checkpoint, by step and layer over the global batch, so that a run resumes with the same ones at
any topology.

Letters: T local tokens of a microbatch, A experts per token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import Batch, Loader
from data.config import fingerprint_text
from trainer.checkpoint import Boxes, TensorBox, routing_name
from trainer.config import AnticipatoryRoutingConfig, Recipe, Segment
from trainer.engine import Engine
from trainer.microbatches import SelectedExperts
from trainer.parallel.grid import Grid
from trainer.parallel.pipeline_stage import index_dtype
from trainer.state import TrainState

Saved = dict[str, Any]

_DATA_FIELDS = {"source_weights", "transforms", "packing"}
"""Fields of the data config that decide what the batch of a step contains."""


@dataclass(frozen=True)
class _LocalRows:
    """Which of a step's rows and columns this rank has."""

    shape: tuple[int, int]
    """Rows and length of the global batch."""
    offset: tuple[int, int]
    rows: int
    """Rows on this rank, filler rows included."""
    columns: int
    micro_batch_size: int

    @property
    def real_rows(self) -> int:
        """Rows on this rank that belong to the step."""
        return min(max(self.shape[0] - self.offset[0], 0), self.rows)


class Anticipation:
    """Batches and selected experts of the steps to come, on one rank.

    Arguments:
        fetch: returns this rank's microbatches of a step; steps rise except after a rollback.
        settings: the lag, and whether routing is on throughout, never, or where the state's
            `anticipation_start` and `anticipation_end` say.
        recipe: of the whole run.
        segment: the phases that these processes train.
    """

    def __init__(
        self,
        engine: Engine,
        grid: Grid,
        loader: Loader,
        fetch: Callable[[int], list[Batch]],
        settings: AnticipatoryRoutingConfig,
        recipe: Recipe,
        segment: Segment,
    ) -> None:
        self.engine, self.grid, self.loader, self.fetch = engine, grid, loader, fetch
        self.lag, self.recipe, self.segment = settings.lag_steps, recipe, segment
        self.always, self.never = settings.when == "always", settings.when == "never"
        self._batches: dict[int, list[Batch]] = {}
        # By step and layer: [local rows, local columns, A].
        self._selected: dict[int, dict[int, Tensor]] = {}

    def batches(self, step: int) -> list[Batch]:
        """Returns the microbatches of the step that trains now."""
        batches = self._batches.pop(step, None)
        return self.fetch(step) if batches is None else batches

    def select(self, state: TrainState, batches: list[Batch]) -> list[SelectedExperts] | None:
        """Selects experts for later steps; returns those selected earlier for this step, or None.

        `batches` are this step's. Every rank calls it before every step's update.
        """
        now = state.step
        if not state.anticipatory_routing_at(now):
            return None
        for step in filter(self._is_readable, range(now + 1, now + self.lag + 1)):
            if state.anticipatory_routing_at(step) and step not in self._batches:
                self._batches[step] = self.fetch(step)
        is_first = now == state.anticipation_start
        for step, fetched in {now: batches, **self._batches}.items():
            if is_first or step not in self._selected:
                self._selected[step] = self._select(step, fetched)
        return self._by_microbatch(now, self._selected.pop(now))

    def _select(self, step: int, batches: list[Batch]) -> dict[int, Tensor]:
        # The step may be of another phase, with another attention.
        selected = self.engine.select_experts(batches, self.recipe.at(step).attention)
        columns = self._local_rows(step).columns
        return {
            layer: torch.cat([micro[layer] for micro in selected]).unflatten(0, (-1, columns))
            for layer in selected[0]
        }

    def _by_microbatch(self, step: int, selected: dict[int, Tensor]) -> list[SelectedExperts]:
        local = self._local_rows(step)
        return [
            {
                layer: x[first : first + local.micro_batch_size].flatten(0, 1)
                for layer, x in selected.items()
            }
            for first in range(0, local.rows, local.micro_batch_size)
        ]

    def _is_readable(self, step: int) -> bool:
        """Whether the rows of a step divide over these processes.

        Those of a later phase with other degrees may not.
        """
        if step >= self.recipe.steps:
            return False
        phase, parallel = self.recipe.at(step), self.segment.parallel
        if phase in self.segment.phases:
            return True
        world = self.grid.world_size
        problems = parallel.row_problems(phase.rows.seq_len, phase.name)
        return not any((*problems, *parallel.step_problems(world, phase.rows, phase.name)))

    def restart(self, state: TrainState) -> None:
        """Drops what is pending after a rollback; routing that is on starts again from here."""
        self._clear()
        if state.anticipatory_routing_at(state.step):
            state.anticipation_start = state.step

    def _clear(self) -> None:
        self._batches.clear()
        self._selected.clear()

    def configure(self, state: TrainState) -> None:
        """Sets `anticipation_start` and `anticipation_end` in `state` as the config wants.

        `always` begins at this step, unless routing is on and continues for at least `lag` steps;
        `never` ends it, and `after_spikes` ends what `always` began.
        """
        if self.always:
            # Nothing was selected for steps after an earlier end: it has to begin before them.
            if not state.anticipatory_routing_at(state.step + max(self.lag - 1, 0)):
                state.anticipation_start = state.step
            state.anticipation_end = None
        elif state.anticipation_end is None or self.never:
            state.anticipation_start = None

    def metadata(self) -> Saved:
        """Returns what `state.json` records about the pending selections."""
        return {**self._origin(), "steps": sorted(self._selected)}

    def boxes(self) -> Boxes:
        """Returns the pending selections by their names in a checkpoint; loading fills them."""
        boxes: Boxes = {}
        for step, selected in self._selected.items():
            local = self._local_rows(step)
            for layer, experts in selected.items():
                if local.real_rows:
                    shape, offset = (*local.shape, experts.shape[2]), (*local.offset, 0)
                    box = TensorBox(experts[: local.real_rows], shape, offset)
                    boxes[routing_name(step, layer)] = [box]
        return boxes

    def restore(self, saved: Saved | None, state: TrainState) -> Boxes:
        """Allocates the selections that were pending in a checkpoint; returns them as `boxes`.

        A run that resumes with another lag or on other data starts anticipation again from here.
        """
        self._clear()
        self.configure(state)
        if not state.anticipatory_routing_at(state.step):
            return {}
        if saved is None or any(saved[name] != ours for name, ours in self._origin().items()):
            self.restart(state)
            return {}
        config = self.engine.model.config
        dtype, active = index_dtype(config.n_routed_experts), config.num_experts_per_tok
        routers = self.engine.model.routers().items()
        learned = [layer for layer, router in routers if not router.hashed]
        for step in filter(self._is_readable, saved["steps"]):
            local = self._local_rows(step)
            shape = (local.rows, local.columns, active)
            self._selected[step] = {
                layer: torch.zeros(shape, dtype=dtype, device=self.grid.device) for layer in learned
            }
        return self.boxes()

    def _origin(self) -> Saved:
        """What has to be equal for saved selections to belong to this run's batches."""
        data = self.loader.config
        phases = [phase.model_dump(mode="json") for phase in self.loader.schedule.phases]
        fields = data.model_dump(mode="json", include=_DATA_FIELDS)
        # Keys are hashed under their original names: selections of older checkpoints stay valid.
        text = fingerprint_text(json.dumps([fields, phases, self.loader.digest])).encode()
        return {"lead": self.lag, "data": hashlib.sha256(text).hexdigest()[:16]}

    def _local_rows(self, step: int) -> _LocalRows:
        schedule, data, sequence = self.loader.schedule, self.grid.data, self.grid.sequence
        index, numbers = schedule.rows_of(step)
        phase = schedule.phases[index]
        rows, columns = -(-len(numbers) // data.size), phase.seq_len // sequence.size
        return _LocalRows(
            (len(numbers), phase.seq_len),
            (data.rank * rows, sequence.rank * columns),
            rows,
            columns,
            phase.micro_batch_size,
        )
