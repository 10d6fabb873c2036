"""Anticipatory routing: experts chosen with the weights of some steps ago (report 4.2.3).

While it is on, step t trains with the weights of step t, but its tokens go to the experts that the
weights of step t - lead chose for them; how much each expert counts, the present gate says. So
every step fetches the rows of `lead` steps later, runs forward over them once, and keeps what the
learned routers choose until then.

Where it was switched on before step s, there are no choices of before s: those of steps s to
s + lead are all made with the weights of step s. The choices that wait are part of a checkpoint,
whole by step and layer, so that a run goes on with the same ones at any topology.
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
from trainer.checkpoint.logical_tensors import Part, Parts, routing_name
from trainer.config.recipe import Recipe
from trainer.config.stability import AnticipatoryRoutingConfig
from trainer.engine import Engine
from trainer.microbatches import SelectedExperts
from trainer.parallel.grid import Grid
from trainer.parallel.pipeline_stage import index_dtype
from trainer.state import TrainState

Saved = dict[str, Any]

# Settings of the data that say what is in the rows of a step.
_ROWS = {"source_weights", "transforms", "packing"}


@dataclass(frozen=True)
class _Place:
    """Where this rank's tokens of a step are among the rows of the whole step."""

    shape: tuple[int, int]
    """Rows and length of the whole step."""
    offset: tuple[int, int]
    rows: int
    """Rows here, with those that only fill up."""
    columns: int
    micro_batch_size: int

    @property
    def real(self) -> int:
        """Of the rows here, those of the step."""
        return min(max(self.shape[0] - self.offset[0], 0), self.rows)


class Anticipation:
    """Rows and choices of the steps to come, on one rank.

    Arguments:
        fetch: this rank's microbatches of a step; asked for steps in rising order.
        settings: by how many steps choices are older than the weights that they are used with, and
            whether the whole run is routed so; otherwise the state says from when to when.
        recipe: of the whole run.
    """

    def __init__(
        self,
        engine: Engine,
        grid: Grid,
        loader: Loader,
        fetch: Callable[[int], list[Batch]],
        settings: AnticipatoryRoutingConfig,
        recipe: Recipe,
    ) -> None:
        self.engine, self.grid, self.loader, self.fetch = engine, grid, loader, fetch
        self.lead, self.recipe = settings.lag_steps, recipe
        self.always, self.never = settings.when == "always", settings.when == "never"
        self._rows: dict[int, list[Batch]] = {}
        # By step and layer: [rows here, columns here, A].
        self._chosen: dict[int, dict[int, Tensor]] = {}

    def batches(self, step: int) -> list[Batch]:
        """The microbatches of the step that trains now."""
        held = self._rows.pop(step, None)
        return self.fetch(step) if held is None else held

    def look_ahead(self, state: TrainState, batches: list[Batch]) -> list[SelectedExperts] | None:
        """Choose for later steps with the present weights; what was chosen for this one, or None.

        `batches` are this step's. Every rank calls it before every step's update.
        """
        now = state.step
        if not state.anticipates(now):
            return None
        ahead = [step for step in range(now + 1, now + self.lead + 1) if step < self.recipe.steps]
        for step in ahead:
            if state.anticipates(step) and step not in self._rows:
                self._rows[step] = self.fetch(step)
        fresh = now == state.anticipation_since
        for step, rows in {now: batches, **self._rows}.items():
            if fresh or step == now + self.lead:
                self._chosen[step] = self._choose(step, rows)
        return self._by_microbatch(now, self._chosen.pop(now))

    def _choose(self, step: int, batches: list[Batch]) -> dict[int, Tensor]:
        # A step that begins another phase is looked at with that phase's attention.
        chosen = self.engine.choose(batches, self.recipe.at(step).attention)
        columns = self._place(step).columns
        return {
            layer: torch.cat([micro[layer] for micro in chosen]).unflatten(0, (-1, columns))
            for layer in chosen[0]
        }

    def _by_microbatch(self, step: int, chosen: dict[int, Tensor]) -> list[SelectedExperts]:
        place = self._place(step)
        return [
            {
                layer: x[first : first + place.micro_batch_size].flatten(0, 1)
                for layer, x in chosen.items()
            }
            for first in range(0, place.rows, place.micro_batch_size)
        ]

    def begin_anew(self, state: TrainState) -> None:
        """Drop what waits, where the run turns back: what anticipates does so from here on."""
        self._forget()
        if state.anticipates(state.step):
            state.anticipation_since = state.step

    def _forget(self) -> None:
        self._rows.clear()
        self._chosen.clear()

    def begin(self, state: TrainState) -> None:
        """Switch on what the config wants on for the whole run, and off what it no longer does."""
        if self.always and state.anticipation_since is None:
            state.anticipation_since = state.step
        if self.always:
            state.anticipation_until = None
        elif state.anticipation_until is None or self.never:
            state.anticipation_since = None

    def waiting(self) -> Saved:
        """What `state.json` says about the choices that wait."""
        return {**self._origin(), "steps": sorted(self._chosen)}

    def parts(self) -> Parts:
        """The choices that wait, by their names in a checkpoint; loading copies into them."""
        found: Parts = {}
        for step, chosen in self._chosen.items():
            place = self._place(step)
            for layer, here in chosen.items():
                if place.real:
                    shape, offset = (*place.shape, here.shape[2]), (*place.offset, 0)
                    part = Part(here[: place.real], shape, offset)
                    found[routing_name(step, layer)] = [part]
        return found

    def restore(self, saved: Saved | None, state: TrainState) -> Parts:
        """Room for the choices that waited at the time of a checkpoint, as `parts`.

        A run that goes on with another lead or on other data anticipates anew from here.
        """
        self._forget()
        self.begin(state)
        if not state.anticipates(state.step):
            return {}
        if saved is None or any(saved[name] != ours for name, ours in self._origin().items()):
            self.begin_anew(state)
            return {}
        config = self.engine.model.config
        dtype, active = index_dtype(config.n_routed_experts), config.num_experts_per_tok
        routers = self.engine.model.routers().items()
        learned = [layer for layer, router in routers if not router.hashed]
        for step in saved["steps"]:
            place = self._place(step)
            shape = (place.rows, place.columns, active)
            self._chosen[step] = {
                layer: torch.zeros(shape, dtype=dtype, device=self.grid.device) for layer in learned
            }
        return self.parts()

    def _origin(self) -> Saved:
        """What has to be the same for saved choices to be of this run's rows."""
        data, manifest = self.loader.config, self.loader.manifest
        phases = [phase.model_dump(mode="json") for phase in self.loader.schedule.phases]
        rows = data.model_dump(mode="json", include=_ROWS)
        known = fingerprint_text(json.dumps([rows, phases, manifest.digest])).encode()
        return {"lead": self.lead, "data": hashlib.sha256(known).hexdigest()[:16]}

    def _place(self, step: int) -> _Place:
        index, numbers = self.loader.schedule.rows_of(step)
        phase, data, sequence = (
            self.loader.schedule.phases[index],
            self.grid.data,
            self.grid.sequence,
        )
        rows, columns = -(-len(numbers) // data.size), phase.seq_len // sequence.size
        return _Place(
            (len(numbers), phase.seq_len),
            (data.rank * rows, sequence.rank * columns),
            rows,
            columns,
            phase.micro_batch_size,
        )
