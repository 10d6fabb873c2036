"""Stats from inside the layers, collected by hooks in one forward pass apart from training.

Hooks are on the model only while stats are collected, so that training itself computes nothing more
and waits for nothing. The stats stay on the device until they are asked for.

Letters: T tokens, D hidden size, N residual streams, E routed experts, P pairs of a token and an
expert, F their inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from model import V4Model
from model.attention import Attention
from model.block import Block
from model.dispatch import Dispatched
from model.execution import BlockPart, CallPart
from model.moe import Experts

Reduction = Literal["mean", "max"]
Key = tuple[str, Reduction, int]
"""Name of a metric, how it is reduced, and the index of the layer (then MTP)."""
HookStats = dict[Key, tuple[float, float]]
"""Sum and count of a mean, or a maximum and 1."""


class StatsCollector:
    """Accumulates stats on the device."""

    def __init__(self) -> None:
        self._tensors: dict[Key, list[Tensor]] = {}

    def add_mean(self, name: str, layer: int, total: Tensor, count: Tensor | int) -> None:
        """Adds to a mean; `total` and `count` are sums, 0-dim."""
        total = total.double()
        count = count.double() if isinstance(count, Tensor) else torch.full_like(total, count)
        self._add((name, "mean", layer), torch.stack([total, count]))

    def add_max(self, name: str, layer: int, values: Tensor) -> None:
        """Adds to a maximum."""
        top = values.max() if values.numel() else values.new_zeros(())
        self._add((name, "max", layer), torch.stack([top.double(), torch.ones_like(top).double()]))

    def _add(self, key: Key, pair: Tensor) -> None:
        self._tensors.setdefault(key, []).append(pair)

    def to_host(self) -> HookStats:
        """Returns everything on the host; the one wait for the device."""
        if not self._tensors:
            return {}
        reduced = []
        for (_, reduction, _), pairs in self._tensors.items():
            stacked = torch.stack(pairs)
            reduced.append(stacked.sum(0) if reduction == "mean" else stacked.amax(0))
        rows = torch.stack(reduced).tolist()
        return {key: (a, b) for key, (a, b) in zip(self._tensors, rows, strict=True)}


@contextmanager
def collect_stats(model: V4Model) -> Iterator[StatsCollector]:
    """Collects stats of the forward passes inside the block.

    `stream_rms`: mean square of the residual streams that a block returns (layer_stats.py takes the
    root); `stream_max`: their largest magnitude. `comb_sum_error`: largest distance from 1 of the
    sum of a row or column of the matrices that mix the streams. `swiglu_clamped_share`,
    `swiglu_max`: share of the experts' inner values that SwiGLU's clamp changes, and the largest
    magnitude before it. `indexer_recall`: of the attention mass that all entries get from all
    queries in a CSA layer, the share of the entries that its indexer selects.
    """
    collector = StatsCollector()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    undo: list[Callable[[], None]] = []
    for block in blocks:
        undo.append(partial(setattr, block, "call_part", block.call_part))
        block.call_part = _collecting(block, block.call_part, collector)
        undo += [hook.remove for hook in _expert_hooks(block, collector)]
        if block.attn.indexer is not None:
            undo.append(_recall_hook(block, collector).remove)
    try:
        with torch.no_grad():
            yield collector
    finally:
        for remove in undo:
            remove()


def _collecting(block: Block, plain: CallPart, collector: StatsCollector) -> CallPart:
    def compute(part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        out = plain(part, function, *inputs)
        if part == "block":
            streams = out[0].float()
            collector.add_mean(
                "stream_rms", block.layer_index, streams.square().sum(), streams.numel()
            )
            collector.add_max("stream_max", block.layer_index, streams.abs())
        elif part == "streams":
            _, _, comb_after = block.hc_ffn.read(out)
            for comb_TNN in (inputs[3], comb_after):
                for dim in (1, 2):
                    error = (comb_TNN.sum(dim) - 1).abs()
                    collector.add_max("comb_sum_error", block.layer_index, error)
        return out

    return compute


def _recall_hook(block: Block, collector: StatsCollector) -> RemovableHandle:
    def recall(module: Attention, inputs: tuple[Any, ...]) -> None:
        x_TD, positions, exchange = inputs[:3]
        padding_T = positions.layout.padding_T
        kept, total = (
            mass_T.masked_fill(padding_T, 0.0).sum()
            for mass_T in module.selected_and_total_mass(x_TD, positions, exchange)
        )
        collector.add_mean("indexer_recall", block.layer_index, kept, total)

    return block.attn.register_forward_pre_hook(recall)


def _expert_hooks(block: Block, collector: StatsCollector) -> list[Any]:
    layer, limit = block.layer_index, block.config.swiglu_limit

    def collect(gate: Tensor, up: Tensor, count: Tensor | int) -> None:
        gate, up = gate.float(), up.float()
        clamped = (gate > limit) | (up.abs() > limit)
        collector.add_mean("swiglu_clamped_share", layer, clamped.sum(), count)
        collector.add_max("swiglu_max", layer, torch.cat([gate.abs(), up.abs()]))

    def experts(module: Experts, inputs: tuple[Dispatched]) -> None:
        (dispatched,) = inputs
        x_PD, ends_E = dispatched.rows_PD, dispatched.ends_E
        is_real_P = dispatched.weights_P != 0  # rows that pad an expert's share have no weight
        is_real_P &= torch.arange(len(x_PD), device=x_PD.device) < ends_E[-1]
        # Zeros in the other rows, some of which no matmul has written; a mask would have to wait.
        zero = x_PD.new_zeros(())
        w1, _, w3 = module.rounded or (module.w1, module.w2, module.w3)
        gate = F.grouped_mm(x_PD, w1.transpose(1, 2), offs=ends_E)
        up = F.grouped_mm(x_PD, w3.transpose(1, 2), offs=ends_E)
        gate, up = (x_PF.where(is_real_P[:, None], zero) for x_PF in (gate, up))
        collect(gate, up, is_real_P.sum() * gate.shape[1])

    outputs: dict[str, Tensor] = {}

    def shared(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            outputs[name] = out
            if len(outputs) == 2:
                collect(outputs.pop("w1"), outputs.pop("w3"), out.numel())

        return hook

    parts = block.ffn.shared_experts
    return [
        block.ffn.experts.register_forward_pre_hook(experts),
        parts.w1.register_forward_hook(shared("w1")),
        parts.w3.register_forward_hook(shared("w3")),
    ]
