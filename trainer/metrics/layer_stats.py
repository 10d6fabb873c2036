"""Stats of every layer: expert loads, router biases, sinks, and what hooks collected.

Letters: L layers and MTP blocks, E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model import V4Model
from trainer.metrics.layer_hooks import HookStats
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.step import LayerStats

_Ranges = dict[tuple[str, int], tuple[float, float]]
"""Minimum and maximum by metric and the index of the layer (then MTP)."""


def compute_layer_stats(
    model: V4Model, expert_load: Tensor, grid: Grid, hook_stats: HookStats | None = None
) -> LayerStats:
    """Returns the stats of all layers, on every rank.

    All ranks call it, after forward and backward.

    Args:
        model: this rank's part.
        expert_load: [L, E] over the global batch, the same on every rank.
        hook_stats: what hooks collected on this rank in a forward pass.

    Returns:
        `expert_load_max`: of the most loaded expert, over the mean; 1 is balanced.
        `expert_load_entropy`: over that of a balanced load, 0 to 1.
        `dead_expert_share`: share of experts that no token selected.
        `router_bias_min`, `router_bias_max`: of learned routers.
        `sink_min`, `sink_max`: of the heads' logits in the softmax's denominator.
        With `hook_stats` also those of layer_hooks.py.
    """
    stats = expert_load_stats(expert_load)
    ranges = _merged(all_gather_objects(_local_ranges(model), grid.world))
    for name in ("router_bias", "sink"):
        pairs = [ranges.get((name, layer)) for layer in range(len(expert_load))]
        stats[f"{name}_min"] = [pair and pair[0] for pair in pairs]
        stats[f"{name}_max"] = [pair and pair[1] for pair in pairs]
    if hook_stats is not None:
        stats |= _over_ranks(all_gather_objects(hook_stats, grid.world), len(expert_load))
    return stats


def _over_ranks(parts: list[HookStats], layers: int) -> LayerStats:
    """Returns means and maxima over the ranks' stats."""
    stats: LayerStats = {}
    keys = {key for part in parts for key in part}
    for key in sorted(keys):
        name, kind, layer = key
        pairs = [part[key] for part in parts if key in part]
        values = stats.setdefault(name, [None] * layers)
        if kind == "max":
            values[layer] = max(top for top, _ in pairs)
            continue
        total, count = (sum(numbers) for numbers in zip(*pairs, strict=True))
        mean = total / count if count else 0.0
        values[layer] = math.sqrt(mean) if name.endswith("_rms") else mean
    return stats


def expert_load_stats(load_LE: Tensor) -> LayerStats:
    """Returns max over mean, normalised entropy and share of unused experts, for each layer."""
    load_LE = load_LE.double()
    experts = load_LE.shape[1]
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1.0)
    stats = {
        "expert_load_max": share_LE.amax(1) * experts,
        "expert_load_entropy": -torch.xlogy(share_LE, share_LE).sum(1) / math.log(max(experts, 2)),
        "dead_expert_share": (load_LE == 0).double().mean(1),
    }
    rows = torch.stack(list(stats.values())).tolist()  # one wait for the device
    return dict(zip(stats, rows, strict=True))


@torch.no_grad()
def _local_ranges(model: V4Model) -> _Ranges:
    """Returns the ranges of router biases and sinks on this rank."""
    tensors: dict[tuple[str, int], Tensor] = {}
    for layer, router in model.routers().items():
        if not router.hashed:
            tensors["router_bias", layer] = router.bias
    for layer, attention in model.attentions().items():
        tensors["sink", layer] = attention.attn_sink
    if not tensors:
        return {}
    ends = torch.stack([torch.stack(tensor.float().aminmax()) for tensor in tensors.values()])
    return {key: (low, high) for key, (low, high) in zip(tensors, ends.tolist(), strict=True)}


def _merged(parts: list[_Ranges]) -> _Ranges:
    ranges: _Ranges = {}
    for part in parts:
        for key, (low, high) in part.items():
            other_low, other_high = ranges.get(key, (low, high))
            ranges[key] = (min(low, other_low), max(high, other_high))
    return ranges


def flatten_layers(stats: Mapping[str, list[float | None]]) -> dict[str, float]:
    """Returns one entry per layer, as monitoring services want them: `layers/NAME/03`."""
    return {
        f"layers/{name}/{layer:02d}": value
        for name, values in stats.items()
        for layer, value in enumerate(values)
        if value is not None
    }
