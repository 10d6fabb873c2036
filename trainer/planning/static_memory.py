"""What processes hold for a whole run, from shapes, placements and the optimizer's layout alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from model import V4Model
from model.parameters import parameter_table
from optim import build_table
from optim.zero.plan import Load, Summary
from trainer.build import DTYPES
from trainer.checkpoint.logical_tensors import has_master
from trainer.config import RunConfig
from trainer.config.recipe import Recipe
from trainer.parallel.degrees import Degrees
from trainer.parallel.placement import place_all
from trainer.parallel.plan import keep_stages
from trainer.parallel.stage_plan import tied_embedding
from trainer.parallel.zero_layout import Family, FamilyKind, families, stage_loads


@dataclass(frozen=True)
class StageParts:
    """What the ranks of a pipeline rank hold.

    Attributes:
        families: parameters by the ranks that hold the same part of them.
        loads: by rank of the stage, what its optimizer keeps and computes of each family.
        weights, gradients: bytes on every rank.
        unmastered: bytes of weights and buffers of which the optimizer keeps no master.
        quantised: bytes of the experts as quantised phases hold them; None where there are none.
    """

    families: list[Family]
    loads: list[dict[tuple[FamilyKind, bool], Load]]
    weights: int
    gradients: int
    unmastered: int
    quantised: int | None

    def parts(self, rank: int) -> dict[str, int]:
        """Bytes by part, of a rank by its number in the stage."""
        masters = states = 0
        for (_, is_low), load in self.loads[rank].items():
            # Masters of fp32 parameters are the parameters, but for matrices that ranks split.
            masters += 4 * (load.muon + load.adamw if is_low else load.joined)
            states += 4 * (load.muon + 2 * load.adamw + load.runs)  # a run counts its steps
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "master weights": masters,
            "optimizer states": states,
        }
        if self.quantised is not None:
            parts["quantised experts"] = self.quantised
        return parts

    def snapshot(self, rank: int) -> int:
        """Bytes of a copy of all that a resume needs of a rank; see stability.py."""
        low = (load for (_, is_low), load in self.loads[rank].items() if is_low)
        masters = sum(4 * (load.muon + load.adamw) for load in low)
        return self.unmastered + masters + self.parts(rank)["optimizer states"]

    @property
    def fullest(self) -> int:
        """The number in the stage of the rank that holds most."""
        return max(range(len(self.loads)), key=lambda rank: sum(self.parts(rank).values()))


def stage_parts(config: RunConfig, degrees: Degrees, pipeline: int) -> StageParts:
    """Of the ranks of one pipeline rank."""
    stages = config.parallel.stages(config.model, Recipe(config).seq_len)
    with torch.device("meta"):
        model = V4Model(config.model, DTYPES[config.precision])
    keep_stages(model, stages, pipeline)
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **model.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    placements = place_all(shapes, degrees, pipeline * (degrees.world // degrees.pipeline))
    elements = {name: math.prod(placement.size) for name, placement in placements.items()}
    trained = {name: placements[name].matrix_shape for name in parameters}
    low = {name for name, tensor in parameters.items() if has_master(tensor)}
    some = families(
        build_table(trained, parameter_table(config.model), config.optim),
        placements,
        low,
        degrees,
        tied_embedding(stages, config.model.num_nextn_predict_layers),
        config.optim.muon,
        config.parallel.max_optimizer_padding,
    )
    quantised = None
    if any(phase.quantised for phase in Recipe(config).phases):
        experts = [name for name in trained if placements[name].kind == "expert"]
        quantised = sum(elements[name] * tensors[name].itemsize for name in experts)
    return StageParts(
        some,
        stage_loads(some, degrees, pipeline, config.optim.muon),
        sum(elements[name] * tensor.itemsize for name, tensor in tensors.items()),
        4 * sum(elements[name] for name in trained),
        sum(elements[n] * t.itemsize for n, t in tensors.items() if n not in low),
        quantised,
    )


def memory_parts(config: RunConfig, degrees: Degrees) -> dict[str, int]:
    """Bytes that the fullest process holds for the whole run, or its quantised phases, by part.

    `trainer.planning.dry_run` counts the same in the real objects.
    """
    found = (stage_parts(config, degrees, rank) for rank in range(degrees.pipeline))
    fullest = [stage.parts(stage.fullest) for stage in found]
    return max(fullest, key=lambda parts: sum(parts.values()))


def snapshot_memory(config: RunConfig, degrees: Degrees) -> int:
    """Bytes of the host that a process holds at most to turn back to after a spike."""
    spikes = config.stability.spikes
    if spikes is None or not spikes.snapshots:
        return 0
    found = (stage_parts(config, degrees, rank) for rank in range(degrees.pipeline))
    return spikes.snapshots * max(
        stage.snapshot(rank) for stage in found for rank in range(len(stage.loads))
    )


def assignment(config: RunConfig, degrees: Degrees) -> Iterator[Table | str]:
    """Who owns what: the families of every pipeline rank, and what ranks keep and compute."""
    table = Table(title="owners of the optimizer's state", title_justify="left")
    for name in ("pipeline rank", "parameters", "precision"):
        table.add_column(name)
    for name in ("matrices", "ranks", "owners", "repeated", "padding"):
        table.add_column(name, justify="right")
    loads = []
    for pipeline in range(degrees.pipeline):
        stage = stage_parts(config, degrees, pipeline)
        loads += [sum(rank.values(), Load()) for rank in stage.loads]
        for family in stage.families:
            matrices = sum(held.count for held in family.held if held.entry.matrices is not None)
            table.add_row(
                str(pipeline),
                family.kind,
                "bf16" if family.is_low else "fp32",
                f"{matrices:,}",
                f"{family.ranks:,}",
                f"{family.layout.owners:,}",
                f"{family.repeats:,}",
                f"{family.layout.padding:.1%}",
            )
    summary = Summary(loads)
    yield table
    yield summary.table()
    yield summary.words()
