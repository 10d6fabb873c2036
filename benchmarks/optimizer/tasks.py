"""The matrices of the optimizer's benchmark, the steps on them, and their timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from model.parameters import Shapes, parameter_shapes, parameter_table
from optim import HybridZero, MuonConfig, OptimConfig, build_table
from optim.zero import Precision, newton_schulz_flops
from trainer.config import load_config
from trainer.parallel.grid import Grid
from trainer.parallel.optimizer_sharding import build_hybrid_zero
from trainer.parallel.placement import placements_of
from trainer.process.local_device import local_device

LAYER = "layers.2."
RATE = 1e-4
Times = Mapping[str, Sequence[float]]
"""Seconds by name, one for each round."""


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    barrier: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times all calls in turn, `rounds` times, after one warm-up of each.

    `barrier` is called before and after each, so that the slowest of several processes counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            barrier()
            start = time.perf_counter()
            call()
            barrier()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Times, one: str, other: str) -> float:
    """Returns the median over rounds of one time over the other; drift cancels out."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


class Matrices:
    """Muon's matrices in one layer with an indexer, with a maximum number of experts."""

    def __init__(self, path: str, experts: int | None = None) -> None:
        self.model = load_config(path).model
        shapes_of_model = parameter_shapes(self.model)
        layer = {name: shape for name, shape in shapes_of_model.items() if name.startswith(LAYER)}
        table = build_table(layer, parameter_table(self.model), OptimConfig())
        shapes = {entry.name: entry.shape for entry in table if entry.matrices is not None}
        self.shapes: Shapes = {
            name: (min(experts, shape[0]), *shape[1:]) if experts and len(shape) == 3 else shape
            for name, shape in shapes.items()
        }
        assignments = build_table(self.shapes, parameter_table(self.model), OptimConfig())
        self.table = [entry for entry in assignments if entry.matrices is not None]

    @property
    def elements(self) -> int:
        """Number of elements of all matrices."""
        return sum(value.numel() for value in self.values(0).values())

    @property
    def count(self) -> int:
        """Number of matrices."""
        return sum(entry.matrices[0] for entry in self.table if entry.matrices)

    def values(self, seed: int) -> dict[str, Tensor]:
        """Returns random values by name."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(s, generator=generator) for name, s in self.shapes.items()}

    def flops(self, muon: MuonConfig) -> float:
        """Returns the FLOPs of Newton–Schulz in one step."""
        return sum(
            entry.matrices[0] * newton_schulz_flops(*entry.matrices[1:], muon)
            for entry in self.table
            if entry.matrices
        )

    def zero(self, grid: Grid, muon: MuonConfig, experts: Precision = "fp32") -> HybridZero:
        """Returns our optimizer over new parameters; experts' gradients are sent in `experts`."""
        config = OptimConfig(muon=muon, clip_norm=None)
        parameters = {name: Parameter(value) for name, value in self.values(0).items()}
        placements = placements_of(self.shapes, grid.degrees, grid.rank)
        return build_hybrid_zero(
            parameters, placements, self.table, config, grid, expert_grad_reduce_dtype=experts
        )


def parameters_of(zero: HybridZero) -> dict[str, Parameter]:
    """Returns all parameters by name."""
    return {name: p for bucket in zero.buckets for name, p in bucket.group.parameters.items()}


def our_step(matrices: Matrices, muon: MuonConfig) -> Callable[[], None]:
    """Returns a step on one process with fixed gradients."""
    zero = matrices.zero(Grid.single(local_device("auto")), muon)
    gradients = matrices.values(1)
    for name, parameter in parameters_of(zero).items():
        parameter.grad = gradients[name]

    def step() -> None:
        zero.reduce()
        zero.step(RATE)

    return step


def bare_matmuls(matrices: Matrices, muon: MuonConfig) -> Callable[[], None]:
    """Returns the matmuls of Newton–Schulz over the batches of our step, and nothing else."""
    inner = matrices.zero(Grid.single(local_device("auto")), muon).inner
    buffers = []
    for batch in inner._batches(inner._muon):
        assert batch[0].entry.matrices is not None
        r, c = sorted(batch[0].entry.matrices[1:])
        n = sum(owned.last - owned.first for owned in batch)
        sizes = (n, r, c), (n, r, r), (n, r, r), (n, r, c)
        buffers.append([torch.randn(size) for size in sizes])
    steps = muon.coarse_steps + muon.fine_steps

    def run() -> None:
        for x_NRC, gram_NRR, square_NRR, out_NRC in buffers:
            for _ in range(steps):
                torch.bmm(x_NRC, x_NRC.mT, out=gram_NRR)
                torch.bmm(gram_NRR, gram_NRR, out=square_NRR)
                torch.bmm(square_NRR, x_NRC, out=out_NRC)

    return run


def torch_step(matrices: Matrices) -> Callable[[], object]:
    """Returns a step of torch.optim.Muon, five steps in bf16, with a parameter for each matrix."""
    gradients, parameters = matrices.values(1), []
    for entry in matrices.table:
        assert entry.matrices is not None
        for matrix in gradients[entry.name].view(entry.matrices):
            parameter = Parameter(torch.randn(matrix.shape))
            parameter.grad = matrix.contiguous()
            parameters.append(parameter)
    return torch.optim.Muon(parameters, lr=RATE, adjust_lr_fn="match_rms_adamw").step
