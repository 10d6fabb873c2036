"""`v4 plan --measure`: layer times on this machine, and a pipeline balanced by them.

One layer of each kind, the MTP block and the head run forward and backward one after another, each
with weights that exist only while it is timed. A layer has the config's widths, but only the
experts of one expert rank (at least the active ones of a token), since the cost of a token does not
depend on their number.

Letters: T tokens of the row, D hidden size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from model import IGNORE_INDEX, ModelConfig, V4Model
from model.config import LayerType
from model.flops import flops_per_layer
from trainer.build import DTYPES
from trainer.config import RunConfig
from trainer.parallel.stage_plan import balance_layers
from trainer.process.local_device import local_device

CPU_TOKENS = 256
REPEATS = 3


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward over a row of `tokens`, on `device`.

    Attributes:
        layers: of a layer of each kind.
        mtp: of the MTP block with its own pass through the head.
        head: of the main model's pass through the head.
    """

    device: torch.device
    tokens: int
    layers: dict[LayerType, float]
    mtp: float
    head: float

    def of_layers(self, model: ModelConfig) -> list[float]:
        """Returns the time of every layer of the model."""
        return [self.layers[kind] for kind in model.layer_types]

    @property
    def tail(self) -> float:
        """Time after the last layer: head and MTP."""
        return self.head + self.mtp


def measure_layers(config: RunConfig, world: int) -> Iterator[Table | str]:
    """Yields times and FLOPs, and the layers of each stage balanced by the times.

    Raises ConfigError if the config does not fit the processes.
    """
    config.check_world(world)
    times = take_times(config, local_device(config.device))
    yield times_table(config, times)
    parallel = config.segment.parallel
    stages = parallel.pipeline * parallel.stages_per_rank
    if stages == 1:
        yield "There is one stage: nothing to balance."
        return
    layers = balance_layers(times.of_layers(config.model), times.tail, stages)
    yield f"parallel.pipeline_layers_per_stage=[{','.join(map(str, layers))}]"


def take_times(config: RunConfig, device: torch.device, repeats: int = REPEATS) -> Times:
    """Times every part; a row is cut to 256 tokens on a CPU."""
    length = config.segment.seq_len
    tokens = length if device.type != "cpu" else min(length, CPU_TOKENS)
    small = config.model.model_copy(update=_few_experts(config))
    with torch.device("meta"):
        model = V4Model(small, DTYPES[config.precision])
    kinds = sorted(set(small.layer_types))
    bench = _Bench(model, tokens, device, repeats, len(kinds) + 1 + len(model.mtp))
    layers = {kind: bench.layer(small.layer_types.index(kind)) for kind in kinds}
    head = bench.head()
    mtp = bench.mtp() + head if len(model.mtp) else 0.0
    return Times(device, tokens, layers, mtp, head)


def _few_experts(config: RunConfig) -> dict[str, int]:
    model, parallel = config.model, config.segment.parallel
    local = model.n_routed_experts // parallel.expert
    return {"n_routed_experts": max(local, model.num_experts_per_tok), "num_hash_layers": 0}


class _Bench:
    """Times parts of a model on the meta device, one of them in memory at a time."""

    def __init__(
        self, model: V4Model, tokens: int, device: torch.device, repeats: int, parts: int
    ) -> None:
        self.model, self.device, self.repeats = model, device, repeats
        self.parts, self.done, self.start = parts, 0, time.perf_counter()
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
        targets = ids.roll(-1, 1)
        targets[:, -1] = IGNORE_INDEX
        self.micro = model.microbatch(ids, targets=targets)
        self.dtype = model.embed.weight.dtype

    def layer(self, index: int) -> float:
        """Returns the seconds of a layer of the main model."""
        block = self.model.layers[index]

        def run() -> Tensor:
            return self.model.run_blocks(self._streams(), self.micro, [block])[0]

        return self._time(block, run)

    def mtp(self) -> float:
        """Returns the seconds of the MTP block without its pass through the head."""
        block, micro = self.model.mtp[0], self.micro
        embedded = self._streams()[:, 0].detach()

        def run() -> Tensor:
            out = block.predict_hidden(  # type: ignore[operator]
                self._streams(),
                embedded,
                micro.next_T,
                micro.positions,
                micro.exchange,
                micro.num_routed_tokens,
            )
            return out[0]

        return self._time(block, run)

    def head(self) -> float:
        """Returns the seconds of one pass through norm, output matrix and cross-entropy."""
        head, norm = self.model.head, self.model.norm
        assert self.micro.counts is not None
        count = self.micro.counts.lm

        def run() -> Tensor:
            hidden_TD = norm(self._streams()[:, 0])
            return self.model.execution.cross_entropy(
                hidden_TD, head.weight, self.micro.query_targets_T, count, IGNORE_INDEX
            )

        return self._time(nn.ModuleList([head, norm]), run)

    def _streams(self) -> Tensor:
        config = self.model.config
        shape = (len(self.micro.tokens_T), config.hc_mult, config.hidden_size)
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=True)

    def _time(self, part: nn.Module, run: Callable[[], Tensor]) -> float:
        """Returns the minimum of some repeats, after a warm-up that is not counted."""
        part.to_empty(device=self.device)
        for tensor in (*part.parameters(), *part.buffers()):
            _fill(tensor.detach(), self.model.config.initializer_range)
        seconds = []
        for _ in range(self.repeats + 1):
            part.zero_grad()
            self._wait()
            start = time.perf_counter()
            run().float().sum().backward()
            self._wait()
            seconds.append(time.perf_counter() - start)
        part.to("meta")
        self._log()
        return min(seconds[1:])

    def _log(self) -> None:
        self.done += 1
        spent = time.perf_counter() - self.start
        left = f", about {spent / self.done * (self.parts - self.done):.0f} s left"
        text = f"measured {self.done} of {self.parts} parts on {self.device.type}, {spent:.0f} s"
        print(text + left * (self.done < self.parts), file=sys.stderr, flush=True)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def _fill(tensor: Tensor, std: float) -> None:
    """Fills in values with the cost of a model's: no zeros, nothing that overflows."""
    if tensor.dim() > 1 and tensor.is_floating_point():
        tensor.normal_(std=std)
    else:
        tensor.fill_(1 if tensor.is_floating_point() else 0)


def times_table(config: RunConfig, times: Times) -> Table:
    """Returns each part's time, and its share of the model's time and FLOPs."""
    layers, tail = flops_per_layer(config.model, times.tokens)
    seconds = times.of_layers(config.model)
    whole = (sum(seconds) + times.tail, sum(layers) + tail)
    table = Table(
        title=f"forward and backward of {times.tokens} tokens on {times.device.type}",
        title_justify="left",
    )
    for name in ("part", "times", "ms", "share of time", "share of FLOPs"):
        table.add_column(name, justify="left" if name == "part" else "right")

    def row(name: str, count: int, time_: float, share: float, flops: Sequence[float]) -> None:
        table.add_row(
            name,
            str(count),
            f"{time_ * 1e3:.1f}",
            f"{share / whole[0]:.2%}",
            f"{sum(flops) / whole[1]:.2%}",
        )

    kinds = config.model.layer_types
    for kind, time_ in times.layers.items():
        costs = [cost for cost, other in zip(layers, kinds, strict=True) if other == kind]
        row(f"{kind} layer", len(costs), time_, time_ * len(costs), costs)
    row("head, and MTP block with its head", 1, times.tail, times.tail, [tail])
    return table
