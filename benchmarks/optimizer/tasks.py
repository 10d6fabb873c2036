"""The matrices of the optimizer's benchmark, the steps on them, and how they are timed."""

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
from trainer.parallel.optimizer_sharding import make_zero
from trainer.parallel.placement import place_all

LAYER = "layers.2."
RATE = 1e-4
Times = Mapping[str, Sequence[float]]
"""Seconds by name; the same round has the same place."""


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of all calls in turn, `rounds` times, after one of each that does not count.

    `meet` is called before and after each: where several processes time together, it makes the
    slowest of them count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            meet()
            start = time.perf_counter()
            call()
            meet()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Times, one: str, other: str) -> float:
    """Median over the rounds of one's time over the other's: a machine's drift falls out."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


class Matrices:
    """What Muon has in one layer with an indexer of a model, at most some of its experts."""

    def __init__(self, path: str, experts: int | None = None) -> None:
        self.model = load_config(path).model
        every = parameter_shapes(self.model)
        layer = {name: shape for name, shape in every.items() if name.startswith(LAYER)}
        table = build_table(layer, parameter_table(self.model), OptimConfig())
        shapes = {entry.name: entry.shape for entry in table if entry.matrices is not None}
        self.shapes: Shapes = {
            name: (min(experts, shape[0]), *shape[1:]) if experts and len(shape) == 3 else shape
            for name, shape in shapes.items()
        }
        found = build_table(self.shapes, parameter_table(self.model), OptimConfig())
        self.table = [entry for entry in found if entry.matrices is not None]

    @property
    def elements(self) -> int:
        """Of all matrices."""
        return sum(value.numel() for value in self.values(0).values())

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return sum(entry.matrices[0] for entry in self.table if entry.matrices)

    def values(self, seed: int) -> dict[str, Tensor]:
        """Random values by name."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(s, generator=generator) for name, s in self.shapes.items()}

    def operations(self, muon: MuonConfig) -> float:
        """Of one step's products."""
        return sum(
            entry.matrices[0] * newton_schulz_flops(*entry.matrices[1:], muon)
            for entry in self.table
            if entry.matrices
        )

    def zero(self, grid: Grid, muon: MuonConfig, experts: Precision = "fp32") -> HybridZero:
        """Our optimizer over new parameters; experts' gradients are sent in `experts`."""
        config = OptimConfig(muon=muon, clip_norm=None)
        parameters = {name: Parameter(value) for name, value in self.values(0).items()}
        placements = place_all(self.shapes, grid.degrees, grid.rank)
        return make_zero(parameters, placements, self.table, config, grid, expert_gradients=experts)


def parameters_of(zero: HybridZero) -> dict[str, Parameter]:
    """All parameters by name."""
    return {name: p for bucket in zero.buckets for name, p in bucket.group.parameters.items()}


def our_step(matrices: Matrices, muon: MuonConfig) -> Callable[[], None]:
    """A step on one process, gradients given."""
    zero = matrices.zero(Grid.single(), muon)
    gradients = matrices.values(1)
    for name, parameter in parameters_of(zero).items():
        parameter.grad = gradients[name]

    def step() -> None:
        zero.reduce()
        zero.step(RATE)

    return step


def bare_products(matrices: Matrices, muon: MuonConfig) -> Callable[[], None]:
    """The products of Newton–Schulz over the batches that our step makes, and nothing else."""
    inner = matrices.zero(Grid.single(), muon).inner
    buffers = []
    for batch in inner._batches(inner._muon):
        assert batch[0].entry.matrices is not None
        r, c = sorted(batch[0].entry.matrices[1:])
        n = sum(piece.last - piece.first for piece in batch)
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
    """torch.optim.Muon, five steps in bf16, over the same matrices, each a parameter."""
    gradients, parameters = matrices.values(1), []
    for entry in matrices.table:
        assert entry.matrices is not None
        for matrix in gradients[entry.name].view(entry.matrices):
            parameter = Parameter(torch.randn(matrix.shape))
            parameter.grad = matrix.contiguous()
            parameters.append(parameter)
    return torch.optim.Muon(parameters, lr=RATE, adjust_lr_fn="match_rms_adamw").step
