"""Muon and AdamW over all parameters of a model, with fp32 masters.

A step has three phases:
  1. AdamW on its parameters, through torch's functional form.
  2. Muon: momentum for every parameter; then same-shape matrices of many parameters (a matrix
     and a transposed one have the same shape here) go through Newton–Schulz together.
  3. Parameters of lower precision are rounded from their masters.

All state exists from construction, so a checkpoint holds the same names at every step. State is
kept by logical parameter name, and on every rank for the part of the parameter that it holds.
AdamW needs no more than the part. Muon needs whole matrices: where ranks split them, the look-ahead
gradient is gathered, batch by batch, and every rank applies its part of the update.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from optim.config import OptimConfig
from optim.errors import OptimError
from optim.muon import apply_update_, look_ahead, momentum_at, orthogonal_update
from optim.partition import Assignment, Shape
from optim.shard import Shard

CPU_BATCH_BYTES = 2 * 2**20
ACCELERATOR_BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Stack:
    """A Muon parameter's matrices, as this rank holds them.

    `shape` is (N, R, C) of the matrices or parts of matrices that are here. `shard` joins the
    parts; it is None where every matrix is whole.
    """

    entry: Assignment
    shape: tuple[int, int, int]
    shard: Shard | None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one whole matrix."""
        assert self.entry.matrices is not None
        return self.entry.matrices[1:]

    @property
    def is_tall(self) -> bool:
        """Whether the matrices have more rows than columns."""
        return self.matrix[0] > self.matrix[1]


@dataclass(frozen=True)
class _Piece:
    """Matrices `first` to `last` (excluded) of one parameter's stack."""

    stack: _Stack
    first: int
    last: int

    def of(self, tensor: Tensor) -> Tensor:
        """These matrices' local part, a [N, R, C] view of a tensor of the local shape."""
        return tensor.view(self.stack.shape)[self.first : self.last]

    def whole(self, part_NRC: Tensor) -> Tensor:
        """The whole matrices, with no more rows than columns, from every rank's part of them."""
        shard = self.stack.shard
        if shard is not None and len(self.stack.entry.shape) == 2:
            part_NRC = shard.gather(part_NRC[0])[None]
        elif shard is not None:
            part_NRC = shard.gather(part_NRC)
        return part_NRC.mT if self.stack.is_tall else part_NRC

    def own(self, whole_NRC: Tensor) -> Tensor:
        """The inverse of `whole`: this rank's part, as a view."""
        whole_NRC = whole_NRC.mT if self.stack.is_tall else whole_NRC
        shard = self.stack.shard
        if shard is None:
            return whole_NRC
        if len(self.stack.entry.shape) == 2:
            return shard.own(whole_NRC[0])[None]
        return shard.own(whole_NRC)


class Optimizer:
    """Updates `named_parameters` in place as `table` says.

    A parameter whose gradient is None is left alone: no decay, no momentum, no change of state.
    Build it when the model has its storage: fp32 masters share it, so later changes of weights
    must be made in place. Raises OptimError when table and parameters do not fit each other.

    The table has whole shapes (of experts, those that are local), and a parameter in `shards` is
    this rank's part. The ranks that split a parameter have the same table and the same parameters
    with a gradient, since they gather in its order.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        table: list[Assignment],
        config: OptimConfig,
        shards: Mapping[str, Shard] | None = None,
    ) -> None:
        shards = shards or {}
        _check_cover(named_parameters, table, shards)
        self.config = config
        self.table = table
        self.parameters = dict(named_parameters)
        self.step_count = 0
        self._adamw = [entry for entry in table if entry.optimizer == "adamw"]
        self._muon = [
            _stack(entry, tuple(named_parameters[entry.name].shape), shards.get(entry.name))
            for entry in table
            if entry.optimizer == "muon"
        ]
        # An fp32 parameter is its own master: the same storage, no copy.
        self._masters = {
            name: parameter.detach() if _is_fp32(parameter) else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        self._momentum = {stack.entry.name: self._zeros(stack.entry) for stack in self._muon}
        self._exp_avg = {entry.name: self._zeros(entry) for entry in self._adamw}
        self._exp_avg_sq = {entry.name: self._zeros(entry) for entry in self._adamw}
        # Steps count per parameter, because AdamW's bias correction starts when training does.
        self._steps = {entry.name: torch.zeros(1) for entry in self._adamw}

    def _zeros(self, entry: Assignment) -> Tensor:
        master = self._masters[entry.name]
        return torch.zeros_like(master, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update at `learning_rate` from every parameter's `.grad`, fp32 or lower."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }
        self._adamw_step(learning_rate, gradients)
        self._muon_step(learning_rate, gradients)
        self.write_parameters()
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
                [self._masters[name] for name in names],
                [gradients[name].float() for name in names],
                [self._exp_avg[name] for name in names],
                [self._exp_avg_sq[name] for name in names],
                [],
                [self._steps[name] for name in names],
                foreach=True,
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
        stacks = [stack for stack in self._muon if stack.entry.name in gradients]
        names = [stack.entry.name for stack in stacks]
        gradients = {name: gradients[name].contiguous() for name in names}
        for name, gradient in gradients.items():
            self._momentum[name].mul_(mu).add_(gradient)
        for batch in self._batches(stacks):
            directions = []
            for piece in batch:
                name = piece.stack.entry.name
                momentum_NRC = piece.of(self._momentum[name])
                ahead_NRC = look_ahead(momentum_NRC, piece.of(gradients[name]), mu)
                directions.append(piece.whole(ahead_NRC))
            update_NRC = orthogonal_update(torch.cat(directions), self.config.muon)
            sizes = [direction.size(0) for direction in directions]
            for piece, part_NRC in zip(batch, update_NRC.split(sizes), strict=True):
                entry = piece.stack.entry
                weight_NRC = piece.of(self._masters[entry.name])
                rate = learning_rate * entry.learning_rate_factor
                apply_update_(weight_NRC, piece.own(part_NRC), rate, entry.weight_decay)

    def _batches(self, stacks: list[_Stack]) -> Iterator[list[_Piece]]:
        """Pieces of equal matrix shape, at most `batch_bytes` together, in the table's order."""
        by_shape: dict[tuple[int, ...], list[_Stack]] = {}
        for stack in stacks:
            by_shape.setdefault(tuple(sorted(stack.matrix)), []).append(stack)
        for (rows, columns), group in by_shape.items():
            room = limit = max(1, self._batch_bytes(group[0].entry) // (4 * rows * columns))
            batch: list[_Piece] = []
            for stack in group:
                first, count = 0, stack.shape[0]
                while first < count:
                    last = min(count, first + room)
                    batch.append(_Piece(stack, first, last))
                    room -= last - first
                    first = last
                    if room == 0:
                        yield batch
                        batch, room = [], limit
            if batch:
                yield batch

    def _batch_bytes(self, entry: Assignment) -> int:
        if self.config.muon.batch_bytes is not None:
            return self.config.muon.batch_bytes
        on_cpu = self._masters[entry.name].device.type == "cpu"
        return CPU_BATCH_BYTES if on_cpu else ACCELERATOR_BATCH_BYTES

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by "kind.parameter", as the live tensors.

        Kinds: `momentum` (Muon); `exp_avg`, `exp_avg_sq`, `step` (AdamW; `step` is [1], on CPU);
        `master` (fp32, only of parameters of lower precision). To restore, copy into them, then
        call `write_parameters()`.
        """
        masters = {n: t for n, t in self._masters.items() if not _is_fp32(self.parameters[n])}
        kinds = {
            "master": masters,
            "momentum": self._momentum,
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
            "step": self._steps,
        }
        return {f"{kind}.{n}": t for kind, tensors in kinds.items() for n, t in tensors.items()}

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round the masters into the parameters of lower precision."""
        for name, parameter in self.parameters.items():
            if not _is_fp32(parameter):
                parameter.copy_(self._masters[name])

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Take the masters anew from the parameters, after weights were loaded into the model."""
        for name, parameter in self.parameters.items():
            if not _is_fp32(parameter):
                self._masters[name].copy_(parameter)


def _stack(entry: Assignment, local: Shape, shard: Shard | None) -> _Stack:
    """The matrices of a parameter whose local part has the shape `local`.

    Raises OptimError where ranks split a parameter of several matrices, but not between them.
    """
    assert entry.matrices is not None
    count, rows, columns = entry.matrices
    if shard is None:
        return _Stack(entry, entry.matrices, None)
    if len(local) == 3:
        return _Stack(entry, (local[0], local[1], local[2]), shard)
    if local[1] == columns and local[0] % rows == 0:  # between matrices: nothing to gather
        return _Stack(entry, (local[0] // rows, rows, columns), None)
    if count > 1:
        raise OptimError(
            f"parameter '{entry.name}' is {count} matrices of {rows} rows, and a rank holds "
            f"{list(local)} of {list(entry.shape)}; ranks must split it between matrices"
        )
    return _Stack(entry, (1, local[0], local[1]), shard)


def _is_fp32(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32


def _check_cover(
    named_parameters: Mapping[str, Parameter], table: list[Assignment], shards: Mapping[str, Shard]
) -> None:
    names = [entry.name for entry in table]
    twice = [name for name, count in Counter(names).items() if count > 1]
    differing = sorted(set(names) ^ set(named_parameters))
    shapes = {entry.name: _local_shape(entry, shards.get(entry.name)) for entry in table}
    wrong = [n for n, p in named_parameters.items() if n in shapes and shapes[n] != tuple(p.shape)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    odd = [name for name, parameter in named_parameters.items() if parameter.dtype not in dtypes]
    for problem, found in (
        ("appear twice in the optimizer table", twice),
        ("are in the model or in the optimizer table, but not in both", differing),
        ("have another shape in the optimizer table than in the model", wrong),
        ("are not fp32, bf16 or fp16", odd),
    ):
        if found:
            raise OptimError(f"these parameters {problem}: {', '.join(found[:5])}")


def _local_shape(entry: Assignment, shard: Shard | None) -> Shape:
    if shard is None:
        return entry.shape
    return tuple(shard.own(torch.empty(entry.shape, device="meta")).shape)
