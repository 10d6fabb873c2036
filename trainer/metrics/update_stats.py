"""Norms of the weights and of their updates, by group of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.parameters import group_of
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel
from trainer.parallel.stage_plan import embedding_is_replicated
from trainer.step import GroupStats


class UpdateStats:
    """Compares weights after an update with a copy from before it, kept on the host.

    Weights that DeepSpeed partitions (ZeRO 3) are left out: it gathers them for a moment only.
    """

    def __init__(self, local: LocalModel, grid: Grid) -> None:
        self.local, self.grid = local, grid
        mtp = local.model.config.num_nextn_predict_layers
        self.embedding_is_replicated = grid.embedding.size > 1 and embedding_is_replicated(
            local.stages, mtp
        )
        self.before = {
            name: weight.detach().to("cpu", copy=True) for name, weight in self._weights().items()
        }

    def after_update(self) -> GroupStats:
        """Returns the stats on every rank; all ranks call it.

        `update_rms`: root mean square of the weights' change in this step, weight decay included.
        `weight_norm`: Euclidean norm of all weights of the group before the update. Both are of the
        model's weights, which are rounded in bf16.
        """
        sums: dict[str, Tensor] = {}
        for name, weight in self._weights().items():
            before = self.before[name].to(weight.device).double()
            change = weight.detach().double() - before
            size = change.new_tensor(before.numel())
            numbers = [change.square().sum(), before.square().sum(), size]
            group = group_of(name)
            share = torch.stack(numbers) / self._replicas(name)
            sums[group] = sums.get(group, torch.zeros_like(share)) + share
        local_sums = {group: tuple(numbers.tolist()) for group, numbers in sums.items()}
        return _over_ranks(all_gather_objects(local_sums, self.grid.world))

    def _replicas(self, name: str) -> int:
        """Number of ranks that hold the same shard of a parameter."""
        shared = 2 if self.embedding_is_replicated and name == "embed.weight" else 1
        return self.local.placements[name].replicas * shared

    def _weights(self) -> dict[str, Tensor]:
        named = self.local.model.named_parameters()
        return {name: weight for name, weight in named if not hasattr(weight, "ds_id")}


def _over_ranks(parts: list[dict[str, tuple[float, ...]]]) -> GroupStats:
    stats: GroupStats = {"update_rms": {}, "weight_norm": {}}
    for group in sorted({group for part in parts for group in part}):
        shares = [part[group] for part in parts if group in part]
        change, size, count = (sum(values) for values in zip(*shares, strict=True))
        stats["update_rms"][group] = math.sqrt(change / count)
        stats["weight_norm"][group] = math.sqrt(size)
    return stats


def flatten_groups(stats: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns one entry per group, as monitoring services want them: `groups/NAME/experts`."""
    return {
        f"groups/{name}/{group}": value
        for name, values in stats.items()
        for group, value in values.items()
    }
