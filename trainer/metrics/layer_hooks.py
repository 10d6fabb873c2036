"""What happens inside the layers, seen in one forward pass beside training.

Hooks are on the model only while it is watched, so that training itself computes nothing more and
waits for nothing. What they see stays on the device until the end of the pass.
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
from model.block import Block, BlockPart, Compute
from model.moe import Dispatched, Experts

Kind = Literal["mean", "max"]
Key = tuple[str, Kind, int]
"""Name of a number, how it comes together, and the layer's row."""
Seen = dict[Key, tuple[float, float]]
"""Sum and count of a mean, or a maximum and 1."""


class Notes:
    """Collects numbers on the device."""

    def __init__(self) -> None:
        self._tensors: dict[Key, list[Tensor]] = {}

    def mean(self, name: str, row: int, total: Tensor, count: Tensor | int) -> None:
        """Add to a mean; `total` and `count` are sums, 0-dim."""
        count = torch.as_tensor(count, device=total.device)
        self._add((name, "mean", row), torch.stack([total.double(), count.double()]))

    def largest(self, name: str, row: int, values: Tensor) -> None:
        """Add to a maximum."""
        top = values.max() if values.numel() else values.new_zeros(())
        self._add((name, "max", row), torch.stack([top.double(), torch.ones_like(top).double()]))

    def _add(self, key: Key, pair: Tensor) -> None:
        self._tensors.setdefault(key, []).append(pair)

    def seen(self) -> Seen:
        """Everything on the host; the one wait for the device."""
        if not self._tensors:
            return {}
        pairs = []
        for (_, kind, _), found in self._tensors.items():
            stacked = torch.stack(found)
            pairs.append(stacked.sum(0) if kind == "mean" else stacked.amax(0))
        rows = torch.stack(pairs).tolist()
        return {key: (a, b) for key, (a, b) in zip(self._tensors, rows, strict=True)}


@contextmanager
def watched(model: V4Model) -> Iterator[Notes]:
    """Notes of the forward passes inside.

    `stream_rms`, `stream_max`: root mean square (as a mean of squares) and largest magnitude of the
    residual streams that a block gives. `comb_departure`: how far a row or column of the streams'
    mixing matrices sums to something else than 1, at most. `clamped`, `swiglu_max`: share of the
    experts' inner values that SwiGLU's clamp changes, and the largest magnitude before it.
    `indexer_recall`: of the attention mass that all entries get from all queries in a CSA layer,
    the share of those that its indexer keeps.
    """
    notes = Notes()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    handles: list[Callable[[], None]] = []
    for block in blocks:
        own = block.__dict__.get("compute")
        block.compute = _watching(block, block.compute, notes)
        handles.append(partial(_put_back, block, own))
        handles += [hook.remove for hook in _expert_hooks(block, notes)]
        if block.attn.indexer is not None:
            handles.append(_recall_hook(block, notes).remove)
    try:
        with torch.no_grad():
            yield notes
    finally:
        for remove in handles:
            remove()


def _put_back(block: Block, own: Compute | None) -> None:
    if own is None:
        del block.compute
    else:
        block.compute = own


def _watching(block: Block, plain: Compute, notes: Notes) -> Compute:
    def compute(part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        out = plain(part, function, *inputs)
        if part == "block":
            streams = out[0].float()
            notes.mean("stream_rms", block.row, streams.square().sum(), streams.numel())
            notes.largest("stream_max", block.row, streams.abs())
        elif part == "streams":
            _, _, comb_after = block.hc_ffn.read(out)
            for comb_TNN in (inputs[3], comb_after):
                for dim in (1, 2):
                    notes.largest("comb_departure", block.row, (comb_TNN.sum(dim) - 1).abs())
        return out

    return compute


def _recall_hook(block: Block, notes: Notes) -> RemovableHandle:
    def recall(module: Attention, inputs: tuple[Any, ...]) -> None:
        x_TD, positions = inputs[:2]
        real_T = ~positions.layout.padding_T
        kept_T, all_T = module.recall(x_TD, positions)
        notes.mean("indexer_recall", block.row, kept_T[real_T].sum(), all_T[real_T].sum())

    return block.attn.register_forward_pre_hook(recall)


def _expert_hooks(block: Block, notes: Notes) -> list[Any]:
    row, limit = block.row, block.config.swiglu_limit

    def note(gate: Tensor, up: Tensor) -> None:
        gate, up = gate.float(), up.float()
        clamped = (gate > limit) | (up.abs() > limit)
        notes.mean("clamped", row, clamped.sum(), clamped.numel())
        notes.largest("swiglu_max", row, torch.cat([gate.abs(), up.abs()]))

    def experts(module: Experts, inputs: tuple[Dispatched]) -> None:
        (sent,) = inputs
        x, ends = sent.rows_PD, sent.ends_E
        real = sent.weights_P != 0  # rows that fill an expert's share up have none
        real &= torch.arange(len(x), device=x.device) < ends[-1]
        w1, _, w3 = module.rounded or (module.w1, module.w2, module.w3)
        gate = F.grouped_mm(x, w1.transpose(1, 2), offs=ends)
        up = F.grouped_mm(x, w3.transpose(1, 2), offs=ends)
        note(gate[real], up[real])

    held: dict[str, Tensor] = {}

    def shared(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            held[name] = out
            if len(held) == 2:
                note(held.pop("w1"), held.pop("w3"))

        return hook

    parts = block.ffn.shared_experts
    return [
        block.ffn.experts.register_forward_pre_hook(experts),
        parts.w1.register_forward_hook(shared("w1")),
        parts.w3.register_forward_hook(shared("w3")),
    ]
