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

CHUNK_ELEMENTS = 16 * 1024 * 1024
"""Of a weight, what is compared at a time in fp64: a stack of experts would take gigabytes."""


class UpdateStats:
    """Compares weights after an update with a copy from before it, kept on the host.

    The copy is page-locked for a GPU, which then copies it there and back while the host continues.
    Weights that DeepSpeed partitions (ZeRO 3) are left out: it gathers them for a moment only.
    """

    def __init__(self, local: LocalModel, grid: Grid) -> None:
        self.local, self.grid = local, grid
        mtp = local.model.config.num_nextn_predict_layers
        self.embedding_is_replicated = grid.embedding.size > 1 and embedding_is_replicated(
            local.stages, mtp
        )
        self.before = {name: _on_host(weight) for name, weight in self._weights().items()}

    def after_update(self) -> GroupStats:
        """Returns the stats on every rank; all ranks call it.

        `update_rms`: root mean square of the weights' change in this step, weight decay included.
        `weight_norm`: Euclidean norm of all weights of the group before the update. Both are of the
        model's weights, which are rounded in bf16.
        """
        sums: dict[str, Tensor] = {}
        for name, weight in self._weights().items():
            group, share = group_of(name), _squares(weight, self.before[name])
            share /= self._replicas(name)
            sums[group] = sums.get(group, torch.zeros_like(share)) + share
        local_sums: dict[str, tuple[float, ...]] = {}
        if sums:
            rows = torch.stack(list(sums.values())).tolist()  # one wait for the device
            local_sums = dict(zip(sums, map(tuple, rows), strict=True))
        return _over_ranks(all_gather_objects(local_sums, self.grid.world))

    def _replicas(self, name: str) -> int:
        """Number of ranks that hold the same shard of a parameter."""
        shared = 2 if self.embedding_is_replicated and name == "embed.weight" else 1
        return self.local.placements[name].replicas * shared

    def _weights(self) -> dict[str, Tensor]:
        named = self.local.model.named_parameters()
        return {name: weight.detach() for name, weight in named if not hasattr(weight, "ds_id")}


def _on_host(weight: Tensor) -> list[Tensor]:
    """Starts a copy of a weight's chunks to the host."""
    chunks = []
    for chunk in weight.flatten().split(CHUNK_ELEMENTS):
        chunks.append(torch.empty_like(chunk, device="cpu", pin_memory=weight.is_cuda))
        chunks[-1].copy_(chunk, non_blocking=True)
    return chunks


def _squares(weight: Tensor, before: list[Tensor]) -> Tensor:
    """Sums of squares of a weight's change and of the weight before it, and its elements, fp64."""
    total = torch.zeros(3, dtype=torch.float64, device=weight.device)
    for now, host_chunk in zip(weight.flatten().split(CHUNK_ELEMENTS), before, strict=True):
        chunk = host_chunk.to(weight.device, non_blocking=True).double()
        change = now.double() - chunk
        total[0] += change.square().sum()
        total[1] += chunk.square().sum()
    total[2] += weight.numel()
    return total


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
