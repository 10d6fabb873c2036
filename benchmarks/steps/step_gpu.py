"""A training step on one GPU, part by part, each compared with its floor.

Every part runs alone, forward and then backward, on the step's rows with the trainer's modules:
embedding, hyper-connections, attention by kind of layer, experts, heads with their losses, the
optimizer, and the copy of the rows to the device. A part's time is multiplied by its calls in a
step. The floor is the larger of FLOPs over the matmul rate and bytes over the copy bandwidth, both
measured in the same run; bytes are the weights once and the part's inputs and outputs once. Then
the ten longest kernels of a whole step.

    python -m benchmarks.steps.step_gpu [--config configs/nano.yaml] [--row 4096] [--rows 1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.steps.machine import (
    Ceilings,
    Step,
    ceilings,
    checked_kernels,
    config_of,
    device_of,
    seconds,
)
from model.block import Block
from model.flops import flops_per_layer
from model.kernels.hyper_connection import write_streams
from model.transformer import Microbatch
from optim.zero import newton_schulz_flops


@dataclass
class PartTimes:
    """Seconds of a call, calls in a step, and the minimum FLOPs and bytes of a call."""

    name: str
    calls: int
    forward: float
    backward: float
    flops: float = 0.0
    bytes: float = 0.0


class Parts:
    """Times the parts of a step on its first microbatch."""

    def __init__(self, step: Step) -> None:
        self.step, self.device, self.model = step, step.device, step.model
        config, data = step.model.config, step.config.data
        self.config, self.tokens = config, data.micro_batch_size * data.seq_len
        self.row, self.rows = data.seq_len, data.micro_batch_size
        batch = step.batches[0]
        self.micro: Microbatch = self.model.microbatch(
            batch.tokens.to(self.device), targets=batch.targets.to(self.device)
        )
        self.width = self.model.head.weight.element_size()
        self.streams = self.model.embed_streams(self.micro).detach()
        self.x_TD = self.streams[:, 0].contiguous()

    def all(self) -> list[PartTimes]:
        """Times all parts, in the order of a step."""
        blocks = [block for block in self.model.layers if isinstance(block, Block)]
        first = {block.attn.kind: block for block in blocks}
        counts = {kind: sum(b.attn.kind == kind for b in blocks) for kind in first}
        dim, streams = self.config.hidden_size, self.config.hc_mult
        stream_bytes = self.tokens * dim * self.width
        mixing = 2 * dim * ((2 + streams) * streams * streams + streams + streams + streams**2)
        block = blocks[0]
        parts = [
            self._part(
                "embedding",
                1,
                lambda: self.model.embed_streams(self.micro),
                self.model.embed,
                moved=(1 + streams) * stream_bytes,
            ),
            self._part(
                "hyper-connections",
                2 * len(blocks),
                lambda x: self._mixed(block, x),
                None,
                self.streams,
                flops=mixing * self.tokens,
                moved=(2 * streams + 2) * stream_bytes,
            ),
        ]
        layers, tail = flops_per_layer(self.config, self.row)
        experts = self._expert_flops()
        for kind, example in first.items():
            row = self.config.layer_types.index(kind)
            attention = layers[row] * self.rows / 3 - experts - 2 * mixing * self.tokens
            parts.append(self._attention(kind, counts[kind], example, attention, stream_bytes))
        parts.append(
            self._part(
                "experts",
                len(blocks),
                lambda x: block.ffn(
                    block.ffn_norm(x),
                    self.micro.tokens_T,
                    self.micro.positions,
                    self.micro.exchange,
                    self.micro.num_routed_tokens,
                )[0],
                block.ffn,
                self.x_TD,
                flops=experts,
                moved=2 * stream_bytes,
            )
        )
        parts.append(
            self._part(
                "heads and losses, MTP block",
                1,
                lambda x: sum(self.model.losses(x, self.micro)[:2]),
                self.model.head,
                self.streams,
                flops=tail * self.rows / 3,
                moved=streams * stream_bytes,
            )
        )
        return [*parts, self._optimizer(), self._data()]

    def _attention(
        self, kind: str, calls: int, block: Block, flops: float, moved: int
    ) -> PartTimes:
        return self._part(
            f"attention, {kind}",
            calls,
            lambda x: block.attn(block.attn_norm(x), self.micro.positions, self.micro.exchange)[0],
            block.attn,
            self.x_TD,
            flops=flops,
            moved=2 * moved,
        )

    def _mixed(self, block: Block, streams: Tensor) -> Tensor:
        x, post, comb = block.hc_attn.read(streams)
        return write_streams(streams, x, post, comb)

    def _expert_flops(self) -> float:
        c = self.config
        active = c.num_experts_per_tok + c.n_shared_experts
        per_token = c.n_routed_experts + 3 * c.moe_intermediate_size * active
        return 2.0 * self.tokens * c.hidden_size * per_token

    def _part(
        self,
        name: str,
        calls: int,
        function: Callable[..., Any],
        module: nn.Module | None,
        *inputs: Tensor,
        flops: float = 0.0,
        moved: float = 0.0,
    ) -> PartTimes:
        leaves = [x.detach().requires_grad_() for x in inputs]
        weights = [] if module is None else list(module.parameters())
        weight_bytes = sum(p.numel() * p.element_size() for p in weights)
        if module is self.model.embed:
            weight_bytes = 0  # it reads rows, counted as inputs
        out = function(*leaves)
        grad = torch.ones_like(out)
        inputs_of_grad = [x for x in (*leaves, *weights) if x.requires_grad]

        def backward() -> None:
            torch.autograd.grad(out, inputs_of_grad, grad, retain_graph=True, allow_unused=True)

        return PartTimes(
            name,
            calls,
            seconds(lambda: function(*leaves), self.device),
            seconds(backward, self.device),
            flops,
            moved + weight_bytes,
        )

    def _optimizer(self) -> PartTimes:
        muon = self.step.config.optim.muon
        self.step.forward_backward()
        flops = sum(
            entry.matrices[0] * newton_schulz_flops(*entry.matrices[1:], muon)
            for entry in self.step.optimizer.table
            if entry.matrices
        )
        count = sum(p.numel() for p in self.model.parameters())
        # Reads gradient, master and momentum; writes master, momentum and the weight.
        moved = count * (5 * 4 + self.width)
        return PartTimes("optimizer", 1, seconds(self.step.update, self.device), 0.0, flops, moved)

    def _data(self) -> PartTimes:
        def copy() -> None:
            with self.step.engine.copies.rows(self.step.batches) as rows:
                for arriving in rows:
                    arriving.wait_for_copies()

        return PartTimes(
            "rows to the device", 1, seconds(copy, self.device), 0.0, 0.0, 16 * self.tokens
        )


def table_of(parts: list[PartTimes], whole: float, limit: Ceilings) -> Table:
    """Returns milliseconds of a step by part; backward's floor is twice forward's."""
    table = Table(title=str(limit))
    for heading in (
        "part",
        "calls",
        "forward ms",
        "backward ms",
        "floor ms",
        "of floor",
        "of step",
    ):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    total = 0.0
    for part in parts:
        spent = part.calls * (part.forward + part.backward)
        floor = part.calls * limit.floor(part.flops, part.bytes)
        floor *= 3 if part.backward else 1
        total += spent
        table.add_row(
            part.name,
            str(part.calls),
            f"{1e3 * part.calls * part.forward:.2f}",
            f"{1e3 * part.calls * part.backward:.2f}",
            f"{1e3 * floor:.3f}",
            f"{floor / spent:.1%}",
            f"{spent / whole:.1%}",
        )
    table.add_section()
    table.add_row("sum of the parts", "", f"{1e3 * total:.2f}", "", "", "", f"{total / whole:.1%}")
    table.add_row("whole step", "", f"{1e3 * whole:.2f}", "", "", "", "")
    return table


def profiled(step: Step, whole: float) -> tuple[list[tuple[str, int, float]], int, float]:
    """Profiles a step that takes `whole` seconds: its kernels, or its operators on a CPU.

    Returns (name, calls, milliseconds), longest first; the number of all calls; and the share of
    the step in which they run.
    """
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    events = profiler.key_averages()

    def spent(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    ran = [event for event in events if event.device_type == where and spent(event) > 0]
    ran.sort(key=spent, reverse=True)
    times = [(event.key, event.count, spent(event) / 1e3) for event in ran]
    return times, sum(event.count for event in ran), sum(map(spent, ran)) / 1e6 / whole


def longest(step: Step, whole: float, count: int = 10) -> tuple[Table, str]:
    """Returns the longest kernels of a step (operators on a CPU), and the share of all of them."""
    on_gpu = step.device.type == "cuda"
    kinds = "kernels" if on_gpu else "operators"
    times, calls, busy = profiled(step, whole)
    table = Table(title=f"longest {kinds} of a step")
    for heading in ("name", "calls", "ms"):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for name, number, milliseconds in times[:count]:
        table.add_row(name[:90], str(number), f"{milliseconds:.2f}")
    summary = f"All {calls:,} {kinds} of a step take {busy:.1%} of its time"
    if on_gpu:
        summary += "; well below 100%, the GPU waits for launches"
    return table, summary + "."


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1, help="rows of the microbatch")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    device = device_of(arguments.device)
    if device is None:
        return 2
    limit = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = config_of(arguments.config, device, arguments.row, arguments.rows)
    step = Step(config, device, checked_kernels(config, device))
    whole = seconds(step, device)
    parts = Parts(step).all()
    console = Console(width=140)
    console.print(table_of(parts, whole, limit))
    for part in longest(step, whole):
        console.print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
