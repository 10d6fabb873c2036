"""What the ranks of any run would hold, found on one process and without their memory.

One pipeline rank after another is built as on its own machine: the grid over torch's fake process
group, whose collectives give shapes and no values, and the model, gradients and optimizer by the
functions that training uses, on the meta device. A layer of each kind, the embedding and the heads
run forward and backward on a microbatch, and what stays alive between the two is counted; torch's
own schedule says how many microbatches hold theirs at once. Routing is taken to be even.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from model import SampleLayout, TokenCounts, V4Model
from model.moe import MoE
from model.qat import rounded_weights
from model.transformer import Microbatch
from optim import HybridZero
from trainer.build import DTYPES, make_local, make_optimizer
from trainer.config import RunConfig
from trainer.config.recipe import Phase, Recipe
from trainer.engine import NativeEngine
from trainer.parallel.degrees import Degrees
from trainer.parallel.expert import ExpertDispatch
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel
from trainer.planning.activations import (
    Addresses,
    GroupedShapes,
    Live,
    Storages,
    most_in_flight,
    tensors_in,
)
from trainer.planning.static_memory import stage_parts

META = torch.device("meta")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StageMemory:
    """A stage's activations, in bytes.

    Attributes:
        number, layers: which stage, and the numbers of its layers.
        held: of one microbatch from its forward to its backward.
        in_flight: microbatches that hold theirs when the rank holds most.
        workspace: what a microbatch's forward and backward need besides, at most, for a while.
    """

    number: int
    layers: range
    held: int
    in_flight: int
    workspace: int


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds, in bytes, gradients and workspaces of one microbatch included.

    Attributes:
        rank, pipeline: its number among all, and on the pipeline axis.
        parameters: elements that it holds and trains.
        resident: what is there all the time, by name; quantised experts but for the update.
        microbatches: token positions of all microbatches of a step, as if all were there at once.
        stages: its stages' activations.
        update: what the optimizer's step needs besides `resident`, at most, for a while.
    """

    rank: int
    pipeline: int
    parameters: int
    resident: dict[str, int]
    microbatches: int
    stages: tuple[StageMemory, ...]
    update: int

    @property
    def activations(self) -> int:
        """Of all microbatches in flight."""
        return sum(stage.held * stage.in_flight for stage in self.stages)

    @property
    def workspace(self) -> int:
        """The largest of its stages'."""
        return max(stage.workspace for stage in self.stages)

    @property
    def total(self) -> int:
        """The most that it holds at any time of a step."""
        passes = self.microbatches + self.activations + self.workspace
        return sum(self.resident.values()) + max(passes, self.update)


@dataclass(frozen=True)
class DryRun:
    """Ranks by pipeline rank: of every stage's ranks the first, the last, and the one that has most
    of the optimizer's state.

    Attributes:
        parameters: elements of all ranks, each logical one counted once.
        microbatches: of a rank in a step.
        phase: whose microbatches these are.
    """

    degrees: Degrees
    ranks: list[RankMemory]
    parameters: int
    microbatches: int
    phase: Phase

    @property
    def fullest(self) -> RankMemory:
        """The rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.total)


class EvenDispatch(ExpertDispatch):
    """Tokens that every rank sends to all others evenly: tensors without values have no counts."""

    def agree(self, slot_L: Tensor, here: int) -> tuple[Tensor, list[int], list[int]]:
        """As if all ranks had chosen each expert equally often."""
        rows, size = len(slot_L), self.axis.size
        send = [rows // size + (rank < rows % size) for rank in range(size)]
        return slot_L.new_empty(size, here), send, [send[self.axis.rank]] * size


def dry_run(
    config: RunConfig, world: int, progress: Progress | None = None, phase: int | None = None
) -> DryRun:
    """Build every pipeline rank of `world` processes in turn.

    Microbatches are those of the run's `phase`, by default of the one with the largest.
    `progress` is told how many ranks are done, and of how many. Raises ConfigError where the
    config does not fit the processes, RuntimeError inside a process group.
    """
    degrees = config.degrees(world)
    alike = degrees.world // degrees.pipeline
    places = []
    for pipeline in range(degrees.pipeline):
        ends = {0, alike - 1, stage_parts(config, degrees, pipeline).fullest}
        places += [pipeline * alike + rank for rank in sorted(ends)]
    known: _Known = {}
    planned = Recipe(config).largest if phase is None else Recipe(config).phases[phase]
    ranks, elements = [], {}
    for number, rank in enumerate(places):
        with as_rank(rank, degrees) as grid:
            part = _Part(config, grid, planned)
            ranks.append(part.memory(known))
            elements.update(part.elements())
        if progress is not None:
            progress(number + 1, len(places))
    parameters = sum(elements.values())
    return DryRun(degrees, ranks, parameters, microbatches_of(planned, degrees), planned)


@contextmanager
def as_rank(rank: int, degrees: Degrees) -> Iterator[Grid]:
    """The grid as `rank` would see it, on the meta device; its collectives move nothing."""
    if degrees.world == 1:
        yield Grid.build(degrees, META)
        return
    if dist.is_initialized():
        raise RuntimeError("a dry run makes process groups of its own, but there are some already")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world)
    try:
        with warnings.catch_warnings(action="ignore"):  # of collectives without a device
            yield Grid.build(degrees, META)
    finally:
        dist.destroy_process_group()


def microbatches_of(phase: Phase, degrees: Degrees) -> int:
    """Microbatches of a rank in a step."""
    rows = phase.rows
    return -(-rows.global_batch_size // degrees.data // rows.micro_batch_size)


@dataclass(frozen=True)
class _Need:
    """Bytes that a microbatch holds from its forward to its backward, and needs besides at most."""

    held: int
    work: int


_Piece = Callable[[Tensor], list[Tensor]]
_Known = dict[tuple[object, ...], _Need]
"""What was measured, by what makes pieces of stages alike."""


class _Part:
    """One rank's part of a run on the meta device."""

    def __init__(self, config: RunConfig, grid: Grid, phase: Phase) -> None:
        self.config, self.grid, self.phase = config, grid, phase
        self.local: LocalModel = make_local(config, grid)
        for module in self.local.model.modules():
            if isinstance(module, MoE) and isinstance(module.dispatch, ExpertDispatch):
                module.dispatch = EvenDispatch(grid)
        self.optimizer = make_optimizer(config, self.local, grid)
        self.engine: NativeEngine = NativeEngine(self.local, grid)
        self.engine.gradients.zero_()
        self.engine.quantised = phase.quantised

    def elements(self) -> dict[str, int]:
        """Elements of every parameter here, over all ranks of the stage and each once."""
        ranks = self.grid.world_size // self.grid.pipeline.size
        return {
            name: parameter.numel() * ranks // self.local.placements[name].replicas
            for name, parameter in self.local.model.named_parameters()
        }

    def memory(self, known: _Known) -> RankMemory:
        """What this rank holds. What is like something in `known` is not measured again."""
        with self.engine.computing():
            return self._memory(known)

    def _memory(self, known: _Known) -> RankMemory:
        micro = self._microbatch()
        numbers = self.local.stages.stages_of(self.grid.pipeline.rank)
        needs = {number: self._stage(number, micro, known) for number in numbers}
        held = {number: need.held for number, need in needs.items()}
        in_flight = self._in_flight(held, len(micro.tokens_T))
        stages = [
            StageMemory(
                number, self.local.stages.layers_of(number), need.held, in_flight[number], need.work
            )
            for number, need in needs.items()
        ]
        microbatches = microbatches_of(self.phase, self.grid.degrees)
        return RankMemory(
            rank=self.grid.rank,
            pipeline=self.grid.pipeline.rank,
            parameters=sum(p.numel() for p in self.local.model.parameters()),
            resident=self._resident(),
            microbatches=microbatches * Storages(tensors_in(micro)).nbytes,
            stages=tuple(stages),
            update=self._update(),
        )

    def _resident(self) -> dict[str, int]:
        parts = resident(self.local.model, self.optimizer)
        if held := rounded_weights(self.local.model):
            parts["quantised experts"] = Storages(held).nbytes
        return parts

    def _microbatch(self) -> Microbatch:
        """Rows that are one sample each."""
        rows_of = self.phase.rows
        rows = min(
            rows_of.micro_batch_size, -(-rows_of.global_batch_size // self.grid.degrees.data)
        )
        lengths = [[rows_of.seq_len]] * rows
        counts = TokenCounts(*[rows * rows_of.seq_len] * 3)
        layout = SampleLayout.from_lengths(lengths, rows_of.seq_len, META)
        tokens = torch.empty(rows, rows_of.seq_len, dtype=torch.int64, device=META)
        return self.local.model.microbatch(
            tokens, layout, torch.empty_like(tokens), counts, attention=self.phase.attention
        )

    def _stage(self, number: int, micro: Microbatch, known: _Known) -> _Need:
        """What a microbatch needs in a stage: the sum of what its layers and its ends hold."""
        model, plan, ends = self.config.model, self.local.stages, self.grid.sequence
        pieces: dict[object, _Piece] = {}
        counts: Counter[object] = Counter()
        for row in plan.layers_of(number):
            likeness: object = (model.layer_types[row], row < model.num_hash_layers)
            pieces.setdefault(likeness, partial(self._layer, row, micro))
            counts[likeness] += 1
        if number == 0:
            pieces["embedding"] = lambda streams: [self.local.model.embed_streams(micro)]
        if plan.is_last(number):
            pieces["heads"] = partial(self._heads, micro)
        held = 0 if number == 0 else self._streams(micro).nbytes
        work = 0
        for likeness, piece in pieces.items():
            place = (likeness, ends.is_first, ends.is_last)
            if place not in known:
                known[place] = self._measure(piece, micro)
            held += known[place].held * (counts[likeness] or 1)
            work = max(work, known[place].work)
        if "block" in self.config.parallel.offload:
            # Layers' inputs are on the host, but for what came from the stage before.
            moved = max(len(plan.layers_of(number)) - (number > 0), 0)
            held -= moved * self._streams(micro).nbytes
        return _Need(held, work)

    def _layer(self, row: int, micro: Microbatch, streams: Tensor) -> list[Tensor]:
        model = self.local.model
        out, stats = model.run_blocks(streams, micro, [model.layers[row]])
        losses = (model.weighted_balance(stats), model.indexer_loss(stats))
        return [out, *(loss for loss in losses if loss is not None)]

    def _heads(self, micro: Microbatch, streams: Tensor) -> list[Tensor]:
        model = self.local.model
        lm, mtp, stats = model.predict(streams, micro)
        balance = model.weighted_balance(stats)
        return [lm + micro.mtp_loss_weight * mtp + (0.0 if balance is None else balance)]

    def _measure(self, piece: _Piece, micro: Microbatch) -> _Need:
        """Of one piece of a stage, the streams that it is given not counted."""
        model = self.local.model
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        streams = self._streams(micro)
        lasting = [*model.parameters(), *model.buffers(), *rounded_weights(model), *grads]
        lasting += [*tensors_in(micro), streams]
        with Live(Storages(lasting)) as live, GroupedShapes(), Addresses():
            out = piece(streams)
            held = live.now
            torch.autograd.backward(out, [torch.empty_like(tensor) for tensor in out])
        return _Need(held, live.peak - held)

    def _streams(self, micro: Microbatch) -> Tensor:
        """What a layer gets from the one before."""
        model = self.config.model
        shape = (len(micro.tokens_T), model.hc_mult, model.hidden_size)
        dtype = DTYPES[self.config.precision]
        return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)

    def _in_flight(self, held: dict[int, int], tokens: int) -> dict[int, int]:
        """By stage, the microbatches whose activations are there at the worst time."""
        pipeline = self.engine.pipeline
        if pipeline.axis.size == 1:
            return dict.fromkeys(held, 1)
        schedule = pipeline.schedule(microbatches_of(self.phase, self.grid.degrees), tokens)
        return most_in_flight(schedule.pipeline_order[pipeline.axis.rank], held)

    def _update(self) -> int:
        """Most bytes that the sum of the gradients and the optimizer's step need for a while."""
        parameters = list(self.local.model.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        states = [piece.tensor for piece in self.optimizer.states()]
        with Live(Storages([*parameters, *grads, *states, *self.optimizer.owned()])) as live:
            self.optimizer.reduce()
            self.optimizer.step(1e-4)
        return live.peak


def resident(model: V4Model, optimizer: HybridZero) -> dict[str, int]:
    """Bytes that a rank holds all the time, by part, after gradients were made."""
    weights = Storages([*model.parameters(), *model.buffers()])
    masters = Storages(master for master in optimizer.owned() if master not in weights)
    states = [piece.tensor for piece in optimizer.states() if piece.tensor not in masters]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {
        "weights": weights.nbytes,
        "gradients": Storages(grads).nbytes,
        "master weights": masters.nbytes,
        "optimizer states": Storages(states).nbytes,
    }
