"""Weights and how far an update moves them, by group of parameters, looked at now and then."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.parameters import group_of
from trainer.parallel.collectives import gather_objects
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel
from trainer.parallel.stage_plan import tied_embedding
from trainer.step import GroupNumbers


class GroupWatch:
    """A copy of this rank's weights before an update, on the host."""

    def __init__(self, local: LocalModel, grid: Grid) -> None:
        self.local, self.grid = local, grid
        mtp = local.model.config.num_nextn_predict_layers
        self.tied = grid.tied.size > 1 and tied_embedding(local.stages, mtp)
        self.before = {
            name: weight.detach().to("cpu", copy=True) for name, weight in self._weights().items()
        }

    def after(self) -> GroupNumbers:
        """All ranks call it after the update.

        `update_rms`: root mean square of the change of a weight in this step, decay included.
        `weight_norm`: Euclidean norm of all weights of the group.
        """
        sums: dict[str, Tensor] = {}
        for name, weight in self._weights().items():
            before = self.before[name].to(weight.device).double()
            change = weight.detach().double() - before
            size = change.new_tensor(before.numel())
            numbers = [change.square().sum(), before.square().sum(), size]
            group = group_of(name)
            share = torch.stack(numbers) / self._holders(name)
            sums[group] = sums.get(group, torch.zeros_like(share)) + share
        mine = {group: tuple(numbers.tolist()) for group, numbers in sums.items()}
        return _numbers(gather_objects(mine, self.grid.world))

    def _holders(self, name: str) -> int:
        """How many ranks hold the same part."""
        shared = 2 if self.tied and name == "embed.weight" else 1
        return self.local.placements[name].replicas * shared

    def _weights(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.local.model.named_parameters() if p.numel()}


def _numbers(parts: list[dict[str, tuple[float, ...]]]) -> GroupNumbers:
    found: GroupNumbers = {"update_rms": {}, "weight_norm": {}}
    for group in sorted({group for part in parts for group in part}):
        shares = [part[group] for part in parts if group in part]
        change, size, count = (sum(values) for values in zip(*shares, strict=True))
        found["update_rms"][group] = math.sqrt(change / count)
        found["weight_norm"][group] = math.sqrt(size)
    return found


def flat_groups(numbers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One entry a group, as monitoring services want them: `groups/NAME/experts`."""
    return {
        f"groups/{name}/{group}": value
        for name, values in numbers.items()
        for group, value in values.items()
    }
