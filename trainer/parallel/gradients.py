"""Gradients of a rank's part of the model, summed over the ranks that hold the same part."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import Parameter

from optim import gradient_norm
from trainer.parallel.collectives import FlatGradients, gather_objects, sum_
from trainer.parallel.grid import Grid
from trainer.parallel.placement import Kind
from trainer.parallel.plan import LocalModel
from trainer.parallel.stages import tied_embedding


class Gradients:
    """Flat fp32 buckets by the axis that they are summed over.

    Weights that every rank of a stage holds are summed over the stage, those that tensor ranks
    split over the ranks with the same part, experts over the ranks with the same experts, and the
    embedding over the first and the last stage besides, where both hold it. Parameters that need
    no gradient have no part in it; which these are must be the same on all ranks.
    """

    def __init__(self, local: LocalModel, grid: Grid) -> None:
        self.grid = grid
        mtp = local.model.config.num_nextn_predict_layers
        self.tied = grid.tied.size > 1 and tied_embedding(local.stages, mtp)
        trained = ((n, p) for n, p in local.model.named_parameters() if p.requires_grad)
        self.parameters = dict(trained)
        self.replicas = []
        groups: dict[Kind | str, list[Parameter]] = {}
        for name, parameter in self.parameters.items():
            placement = local.placements[name]
            shared = self.tied and name == "embed.weight"
            groups.setdefault("embedding" if shared else placement.kind, []).append(parameter)
            self.replicas.append(placement.replicas * (2 if shared else 1))
        axes = {
            "whole": [grid.stage],
            "tensor": [grid.split],
            "expert": [grid.expert_data],
            "embedding": [grid.split, grid.tied],
        }
        # In one order on every rank, whatever parameters it holds.
        self.buckets = [
            (FlatGradients(groups[kind]), over) for kind, over in axes.items() if kind in groups
        ]

    def zero_(self) -> None:
        """Set every gradient to zero."""
        for flat, _ in self.buckets:
            flat.zero_()

    def sum_(self) -> None:
        """Sum every gradient over the ranks that hold the same part."""
        for flat, over in self.buckets:
            for axis in over:
                flat.sum_(axis)

    def first_not_finite(self) -> str | None:
        """The first parameter in the model's order whose gradient has a NaN or an infinity.

        Every rank calls it and gets the same name. None where all are finite.
        """
        found = [
            (_place(name), index, name)
            for index, (name, parameter) in enumerate(self.parameters.items())
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        firsts = [first for some in gather_objects(found[:1], self.grid.world) for first in some]
        return min(firsts)[2] if firsts else None

    def norm(self) -> Tensor:
        """Norm of the whole model's gradient, every element counted once; 0-dim fp32."""
        return gradient_norm(
            self.parameters.values(), self.replicas, lambda total: sum_(total, self.grid.world)
        )


def _place(name: str) -> float:
    """Orders the parts of a model that ranks hold apart: embedding, layers, and what follows."""
    if name == "embed.weight":
        return -1
    return int(name.split(".")[1]) if name.startswith("layers.") else math.inf
