"""Shared by the benchmarks of whole steps: timing, ceilings, configs, steps on random rows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import Batch
from data.activity import Activity
from model.kernels.operations import Kernels
from trainer.build import build_native
from trainer.config import RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.kernels import RankKernels, agree, local_verdicts
from trainer.parallel.grid import Grid

ROOT = Path(__file__).parents[2]


def seconds(call: Callable[[], object], device: torch.device, budget: float = 3.0) -> float:
    """Returns the median time of calls within about ``budget`` seconds, at least three, after one
    warm-up."""
    times: list[float] = []
    for number in range(32):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if number:
            times.append(time.perf_counter() - start)
        if sum(times) > budget and len(times) >= 3:
            break
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine: FLOP/s of a matmul, and bytes copied per second."""

    flops: float
    bytes: float

    def floor(self, flops: float, moved: float) -> float:
        """Returns the minimum seconds at these rates."""
        return max(flops / self.flops, moved / self.bytes)

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP/s in a matmul, {self.bytes / 1e9:.3g} GB/s in a copy"


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures the rates of a large matmul and a large copy."""
    size, length = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(length, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    return Ceilings(
        2 * size**3 / seconds(lambda: a @ b, device),
        2 * length / seconds(lambda: y.copy_(x), device),
    )


def device_of(name: str) -> torch.device | None:
    """Returns the device, or None, after a sentence on stderr, if it is a GPU and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        print(
            "This benchmark needs a GPU, and torch sees none; try it with --device cpu and a small "
            "config, for instance configs/debug.yaml with --rows 256.",
            file=sys.stderr,
        )
        return None
    return torch.device(name)


def config_of(
    name: str, device: torch.device, row: int, rows: int = 1, more: Sequence[str] = ()
) -> RunConfig:
    """Returns a shipped config with one microbatch of ``rows`` rows a step; fp32 on a CPU.

    ``more`` are overrides.

    ``flash-slice`` is four layers of configs/flash.yaml, of every kind, with 32 of the 256 experts,
    as on one of eight expert-parallel ranks.
    """
    overrides = [
        f"data.seq_len={row}",
        f"data.global_batch_size={rows}",
        f"data.micro_batch_size={rows}",
    ]
    overrides.append(f"precision={'bf16' if device.type == 'cuda' else 'fp32'}")
    if name == "flash-slice":
        name = "configs/flash.yaml"
        overrides += ["model.num_hidden_layers=4", "model.layer_types=[window,csa,hca,csa]"]
        overrides += ["model.n_routed_experts=32", "model.num_hash_layers=1"]
        overrides.append("model.num_nextn_predict_layers=0")
    return load_config(ROOT / name, [*overrides, *more])


def random_batch(config: RunConfig, seed: int = 0) -> Batch:
    """Returns one microbatch of random rows, each a single sample."""
    data = config.data
    shape = (data.micro_batch_size, data.seq_len + 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, config.model.vocab_size, shape, generator=generator)
    lengths = [[data.seq_len]] * data.micro_batch_size
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), lengths)


def checked_kernels(
    config: RunConfig, device: torch.device, started: float | None = None
) -> Kernels:
    """Returns the kernels that a run of this config would use, after checking unchecked ones.

    Temporary failures from before `started` are checked again: by default, all that are in the file
    when this process starts, and with 0 none.
    """
    with Activity("checking kernels") as activity:
        verdicts = local_verdicts(config, device, activity, started=started)
        one = RankKernels.of(config, device, verdicts)
    return agree(config, 0, [one], lambda rank: f"rank {rank}").kernels


class Step:
    """The trainer's step on random rows, with its engine and optimizer."""

    def __init__(self, config: RunConfig, device: torch.device, kernels: Kernels) -> None:
        self.config, self.device = config, device
        self.grid = Grid.single(device)
        local, self.optimizer = build_native(config, self.grid, kernels=kernels)
        self.model = local.model
        self.engine: NativeEngine = NativeEngine(local, self.grid, self.optimizer)
        self.batches = [random_batch(config)]
        self.gradients: list[Tensor | None] = []

    def forward_backward(self) -> None:
        """Computes gradients, and their norm and the losses for the update."""
        self.gradients = []
        self.losses = self.engine.forward_backward(self.batches)
        # With a norm below 1 nothing is clipped, so the update can be repeated.
        self.norm = self.engine.gradient_norm().clamp(max=0.5)
        self.gradients = [master.grad for master in self.optimizer.owned()]

    def update(self) -> None:
        """Updates from the last gradients, repeatably, without waiting for the metrics."""
        for master, gradient in zip(self.optimizer.owned(), self.gradients, strict=True):
            master.grad = None if gradient is None else gradient.clone()  # it is overwritten
        self.engine.step(1e-6, self.norm)
        self.model.update_router_bias(self.losses.expert_load)

    def __call__(self) -> None:
        """Runs a whole step."""
        self.forward_backward()
        self.update()


def peak_gib(device: torch.device) -> float | None:
    """Returns the peak memory of tensors since the last `restart_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def restart_peak(device: torch.device) -> None:
    """Resets the peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def formatted(value: float | None, form: str) -> str:
    """Formats the number, or a dash for None."""
    return "-" if value is None else format(value, form)
