"""What the benchmarks of whole steps share: times, ceilings, configs and steps on random rows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import Batch
from trainer.build import build
from trainer.config import RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid

ROOT = Path(__file__).parents[2]


def seconds(call: Callable[[], object], device: torch.device, budget: float = 3.0) -> float:
    """Median of calls within about ``budget`` seconds, after one to warm up; three at least."""
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
    """What this machine shows: operations of a matrix product, and bytes of a copy, per second."""

    operations: float
    bytes: float

    def floor(self, operations: float, moved: float) -> float:
        """The seconds that nothing can beat by much."""
        return max(operations / self.operations, moved / self.bytes)

    def __str__(self) -> str:
        return (
            f"{self.operations / 1e12:.3g} TFLOP/s in a matrix product, "
            f"{self.bytes / 1e9:.3g} GB/s in a copy"
        )


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured, not read from a data sheet."""
    size, length = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(length, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    return Ceilings(
        2 * size**3 / seconds(lambda: a @ b, device),
        2 * length / seconds(lambda: y.copy_(x), device),
    )


def device_of(name: str) -> torch.device | None:
    """The device, or None after a sentence on stderr where it is a GPU and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        print(
            "This benchmark needs a GPU, and torch sees none; --device cpu tries it out on a small "
            "config, for instance configs/debug.yaml with --rows 256.",
            file=sys.stderr,
        )
        return None
    return torch.device(name)


def config_of(name: str, device: torch.device, row: int, rows: int = 1) -> RunConfig:
    """A shipped config with one microbatch of so many rows a step; fp32 on a CPU.

    ``flash-slice`` is four layers of configs/flash.yaml, of every kind, with 32 of the 256 experts,
    what a rank holds where eight share them.
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
    return load_config(ROOT / name, overrides)


def random_batch(config: RunConfig, seed: int = 0) -> Batch:
    """One microbatch of rows that are one sample each."""
    data = config.data
    shape = (data.micro_batch_size, data.seq_len + 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, config.model.vocab_size, shape, generator=generator)
    lengths = [[data.seq_len]] * data.micro_batch_size
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), lengths)


class Step:
    """The trainer's step on random rows: the engine and the optimizer it really uses."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.grid = Grid.single(device)
        local, self.optimizer = build(config, self.grid)
        self.model = local.model
        self.engine: NativeEngine = NativeEngine(local, self.grid, self.optimizer)
        self.batches = [random_batch(config)]
        self.gradients: list[Tensor | None] = []

    def forward_backward(self) -> None:
        """Gradients in place, and what an update needs."""
        self.gradients = []
        self.losses = self.engine.forward_backward(self.batches)
        # Of a norm below 1 an update clips nothing, so that it can be timed again.
        self.norm = self.engine.gradient_norm().clamp(max=0.5)
        self.gradients = [master.grad for master in self.optimizer.owned()]

    def update(self) -> None:
        """The update from the last gradients, however often, without the wait for the numbers."""
        for master, gradient in zip(self.optimizer.owned(), self.gradients, strict=True):
            master.grad = gradient  # which a step takes away
        self.engine.step(1e-6, self.norm)
        self.model.update_router_bias(self.losses.expert_load)

    def __call__(self) -> None:
        """A whole step."""
        self.forward_backward()
        self.update()


def peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors have held since the last `restart_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def restart_peak(device: torch.device) -> None:
    """Begin a new record of the peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def shown(value: float | None, form: str) -> str:
    """The number, or a dash where there is none."""
    return "-" if value is None else format(value, form)
