"""Muon and AdamW over fp32 parameters on one rank.

A step has two parts:
  1. AdamW on its parameters, through torch's functional form: one fused call for each pair
     of weight decay and learning-rate factor.
  2. Muon: momentum for every parameter; then matrices of the same shape, of many parameters, go
     through Newton–Schulz together. [R, C] and [C, R] count as the same shape.

All states are allocated at construction, so a checkpoint has the same names at every step.
`optim.zero.hybrid_zero` runs it on the masters that a rank owns.

Letters: N matrices of R rows and C columns.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from optim.config import OptimConfig
from optim.errors import OptimError
from optim.muon import apply_updates_, momentum_at, nesterov_, orthogonal_update
from optim.partition import Assignment
from optim.syrk import Syrk, syrk_

CPU_BATCH_BYTES = 2 * 2**20
ACCELERATOR_BATCH_BYTES = 2**30


@dataclass(frozen=True)
class _MatrixRange:
    """The matrices from `first` up to `last`, exclusive, of one parameter's stack."""

    entry: Assignment
    first: int
    last: int

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these matrices of a tensor of the parameter's shape: a view, [N, R, C]."""
        return tensor.view(_matrices(self.entry))[self.first : self.last]

    def wide(self, matrices_NRC: Tensor) -> Tensor:
        """Transposes matrices of more rows than columns, as a view; it is its own inverse."""
        _, rows, columns = _matrices(self.entry)
        return matrices_NRC.mT if rows > columns else matrices_NRC


def _matrices(entry: Assignment) -> tuple[int, int, int]:
    assert entry.matrices is not None
    return entry.matrices


class Optimizer:
    """Updates `named_parameters` in place as `table` says.

    `syrk` computes the symmetric matmuls of Newton–Schulz.

    A parameter whose gradient is None is skipped: no decay, no momentum, no change of state.
    Raises OptimError when table and parameters do not match, or one is not fp32 or not contiguous.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        table: list[Assignment],
        config: OptimConfig,
        syrk: Syrk = syrk_,
    ) -> None:
        _check_table(named_parameters, table)
        self.config, self.syrk = config, syrk
        self.table = table
        self.parameters = dict(named_parameters)
        self.step_count = 0
        self._adamw = [entry for entry in table if entry.optimizer == "adamw"]
        self._muon = [entry for entry in table if entry.optimizer == "muon"]
        self._momentum = self._zeros(self._muon)
        self._exp_avg = self._zeros(self._adamw)
        self._exp_avg_sq = self._zeros(self._adamw)
        # Steps are counted for each parameter: AdamW's bias correction starts when it is trained.
        self._steps = {
            entry.name: torch.zeros(1, device=self.parameters[entry.name].device)
            for entry in self._adamw
        }

    def _zeros(self, entries: list[Assignment]) -> dict[str, Tensor]:
        return {entry.name: torch.zeros_like(self.parameters[entry.name]) for entry in entries}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates every parameter at `learning_rate` from its `.grad`, which may be overwritten."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }
        self._adamw_step(learning_rate, gradients)
        self._muon_step(learning_rate, gradients)
        self.step_count += 1

    def _adamw_step(self, learning_rate: float, gradients: Mapping[str, Tensor]) -> None:
        settings = self.config.adamw
        groups: dict[tuple[float, float], list[str]] = {}
        for entry in self._adamw:
            if entry.name in gradients:
                group = entry.weight_decay, entry.learning_rate_factor
                groups.setdefault(group, []).append(entry.name)
        for (weight_decay, factor), names in groups.items():
            adamw(
                [self.parameters[name] for name in names],
                # torch's fused kernel ignores strides.
                [gradients[name].contiguous() for name in names],
                [self._exp_avg[name] for name in names],
                [self._exp_avg_sq[name] for name in names],
                [],
                [self._steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                lr=learning_rate * factor,
                weight_decay=weight_decay,
                eps=settings.eps,
                maximize=False,
            )

    def _muon_step(self, learning_rate: float, gradients: Mapping[str, Tensor]) -> None:
        mu = momentum_at(self.config.muon, self.step_count)
        entries = [entry for entry in self._muon if entry.name in gradients]
        directions = {entry.name: gradients[entry.name].contiguous() for entry in entries}
        if directions:  # for all parameters at once: few launches on an accelerator
            momenta = [self._momentum[name] for name in directions]
            nesterov_(list(directions.values()), momenta, mu)
        for batch in self._batches(entries):
            parts = [part.wide(part.of(directions[part.entry.name])) for part in batch]
            direction_NRC = parts[0] if len(parts) == 1 else torch.cat(parts)
            update_NRC = orthogonal_update(direction_NRC, self.config.muon, self.syrk)
            sizes = [part.last - part.first for part in batch]
            self._apply(batch, update_NRC.split(sizes), learning_rate)

    def _apply(
        self, batch: Sequence[_MatrixRange], updates: Sequence[Tensor], learning_rate: float
    ) -> None:
        """Applies the updates of a batch, none of them higher than wide, to the parameters."""
        groups: dict[tuple[float, float], list[tuple[Tensor, Tensor]]] = {}
        for part, update_NRC in zip(batch, updates, strict=True):
            weight_NRC = part.wide(part.of(self.parameters[part.entry.name]))
            group = part.entry.learning_rate_factor, part.entry.weight_decay
            groups.setdefault(group, []).append((weight_NRC, update_NRC))
        for (factor, weight_decay), pairs in groups.items():
            weights, group_updates = zip(*pairs, strict=True)
            apply_updates_(weights, group_updates, learning_rate * factor, weight_decay)

    def _batches(self, entries: list[Assignment]) -> Iterator[list[_MatrixRange]]:
        """Yields matrices of equal shape, up to `max_batch_bytes`, in the table's order."""
        by_shape: dict[tuple[int, ...], list[Assignment]] = {}
        for entry in entries:
            by_shape.setdefault(tuple(sorted(_matrices(entry)[1:])), []).append(entry)
        for (rows, columns), group in by_shape.items():
            room = limit = max(1, self._batch_bytes(group[0]) // (4 * rows * columns))
            batch: list[_MatrixRange] = []
            for entry in group:
                first, count = 0, _matrices(entry)[0]
                while first < count:
                    last = min(count, first + room)
                    batch.append(_MatrixRange(entry, first, last))
                    room -= last - first
                    first = last
                    if room == 0:
                        yield batch
                        batch, room = [], limit
            if batch:
                yield batch

    def _batch_bytes(self, entry: Assignment) -> int:
        if self.config.muon.max_batch_bytes is not None:
            return self.config.muon.max_batch_bytes
        on_cpu = self.parameters[entry.name].device.type == "cpu"
        return CPU_BATCH_BYTES if on_cpu else ACCELERATOR_BATCH_BYTES

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns all state tensors, by "kind.parameter", as the live tensors.

        The kinds are `momentum` of Muon and `exp_avg`, `exp_avg_sq` and `step` of AdamW, the last
        of shape [1], the others of the parameter's. To restore, copy into them, and set
        `step_count`, which drives the warm-up of the momentum.
        """
        kinds = {
            "momentum": self._momentum,
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
            "step": self._steps,
        }
        return {f"{kind}.{n}": t for kind, tensors in kinds.items() for n, t in tensors.items()}


def check_names(parameters: Mapping[str, Parameter], table: Sequence[Assignment]) -> None:
    """Raises OptimError unless the table has every parameter exactly once, and no others."""
    names = [entry.name for entry in table]
    _raise_for(
        ("appear twice in the optimizer table", [n for n, c in Counter(names).items() if c > 1]),
        (
            "are in the model or in the optimizer table, but not in both",
            sorted(set(names) ^ set(parameters)),
        ),
    )


def _check_table(named_parameters: Mapping[str, Parameter], table: list[Assignment]) -> None:
    """Raises OptimError unless names and shapes match and every parameter can be updated."""
    check_names(named_parameters, table)
    shapes = {entry.name: entry.shape for entry in table}
    _raise_for(
        (
            "have another shape in the optimizer table than in the model",
            [n for n, p in named_parameters.items() if shapes[n] != tuple(p.shape)],
        ),
        (
            "are not fp32",
            [n for n, p in named_parameters.items() if p.dtype != torch.float32],
        ),
        (
            "are not contiguous",
            [n for n, p in named_parameters.items() if not p.is_contiguous()],
        ),
    )


def _raise_for(*problems: tuple[str, list[str]]) -> None:
    """Raises OptimError for the first problem that some parameters have."""
    for problem, names in problems:
        if names:
            raise OptimError(f"these parameters {problem}: {', '.join(names[:5])}")
