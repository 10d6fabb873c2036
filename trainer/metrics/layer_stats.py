"""What every layer does, looked at now and then: loads of experts, router biases, sinks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model import V4Model
from trainer.metrics.layer_hooks import Seen
from trainer.parallel.collectives import gather_objects
from trainer.parallel.grid import Grid
from trainer.step import LayerNumbers


def layer_numbers(
    model: V4Model, expert_load: Tensor, grid: Grid, seen: Seen | None = None
) -> LayerNumbers:
    """The numbers of all layers, on every rank; all ranks call it together, outside of a step.

    Args:
        model: this rank's part.
        expert_load: [layers (+ MTP), E] over the global batch, the same on every rank.
        seen: what this rank saw in a pass that was watched.

    Returns:
        `expert_load_max`: of the busiest expert, over the mean; 1 is even.
        `expert_load_entropy`: over that of an even load, 0 to 1.
        `experts_dead`: share of experts that no token chose.
        `router_bias_min`, `router_bias_max`: of learned routers.
        `sink_min`, `sink_max`: of the heads' logits in the softmax's denominator.
        Where a pass was watched also its numbers; see watch.py.
    """
    found = expert_numbers(expert_load)
    ranges = _merged(gather_objects(_own_ranges(model), grid.world))
    for name in ("router_bias", "sink"):
        pairs = [ranges.get((name, row)) for row in range(len(expert_load))]
        found[f"{name}_min"] = [pair and pair[0] for pair in pairs]
        found[f"{name}_max"] = [pair and pair[1] for pair in pairs]
    if seen is not None:
        found |= _of_all_ranks(gather_objects(seen, grid.world), len(expert_load))
    return found


def _of_all_ranks(parts: list[Seen], rows: int) -> LayerNumbers:
    """Means and maxima over what the ranks saw."""
    found: LayerNumbers = {}
    keys = {key for part in parts for key in part}
    for name, kind, row in sorted(keys):
        pairs = [part[name, kind, row] for part in parts if (name, kind, row) in part]
        values = found.setdefault(name, [None] * rows)
        if kind == "max":
            values[row] = max(top for top, _ in pairs)
            continue
        total, count = (sum(numbers) for numbers in zip(*pairs, strict=True))
        mean = total / count if count else 0.0
        values[row] = math.sqrt(mean) if name.endswith("_rms") else mean
    return found


def expert_numbers(load: Tensor) -> LayerNumbers:
    """Busiest over mean, normalised entropy and share without a token, of each row of [n, E]."""
    load = load.double()
    share = load / load.sum(1, keepdim=True).clamp(min=1.0)
    entropy = -torch.xlogy(share, share).sum(1) / torch.log(torch.tensor(float(load.shape[1])))
    return {
        "expert_load_max": (share.amax(1) * load.shape[1]).tolist(),
        "expert_load_entropy": entropy.tolist(),
        "experts_dead": (load == 0).double().mean(1).tolist(),
    }


Ranges = dict[tuple[str, int], tuple[float, float]]


@torch.no_grad()
def _own_ranges(model: V4Model) -> Ranges:
    """Least and largest number, by what it is of and the layer's row."""
    tensors: dict[tuple[str, int], Tensor] = {}
    for row, router in model.routers().items():
        if not router.hashed:
            tensors["router_bias", row] = router.bias
    for row, attention in model.attentions().items():
        tensors["sink", row] = attention.attn_sink
    if not tensors:
        return {}
    ends = torch.stack([torch.stack(tensor.float().aminmax()) for tensor in tensors.values()])
    return {key: (low, high) for key, (low, high) in zip(tensors, ends.tolist(), strict=True)}


def _merged(parts: list[Ranges]) -> Ranges:
    whole: Ranges = {}
    for part in parts:
        for key, (low, high) in part.items():
            least, most = whole.get(key, (low, high))
            whole[key] = (min(low, least), max(high, most))
    return whole


def flat(numbers: Mapping[str, list[float | None]]) -> dict[str, float]:
    """One entry a layer, as monitoring services want them: `layers/NAME/03`."""
    return {
        f"layers/{name}/{row:02d}": value
        for name, values in numbers.items()
        for row, value in enumerate(values)
        if value is not None
    }
