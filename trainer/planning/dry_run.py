"""Memory of the ranks of any run, counted in one process that allocates none of it.

One pipeline rank after another is built as on its own machine: the grid over torch's fake process
group, whose collectives give shapes and no values, and the model, gradients and optimizer by the
functions that training uses, on the meta device. A layer of each kind, the embedding and the heads
run forward and backward on a microbatch, and the storages alive between the two are counted; the
pipeline schedule gives the number of microbatches in flight. Routing is assumed to be even.

Letters: T local tokens of a microbatch, L rows sent to experts.
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
from model.qat import rounded_weights
from model.transformer import Microbatch
from optim import HybridZero
from trainer.build import DTYPES, make_local, make_optimizer
from trainer.config import Phase, RunConfig
from trainer.engine import NativeEngine
from trainer.parallel.degrees import Degrees
from trainer.parallel.expert import Counts, ExpertDispatch
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel
from trainer.parallel.recompute import ActivationCheckpointing
from trainer.planning.activations import (
    Addresses,
    GroupedShapes,
    Live,
    Storages,
    peak_in_flight,
    tensors_in,
)
from trainer.planning.static_memory import pipeline_rank_memory, triton_workspace

META = torch.device("meta")
QUANTISED = "quantised experts"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StageMemory:
    """Memory of a stage's activations, in bytes.

    Attributes:
        number, layers: the stage's number, and the numbers of its layers.
        activations: of one microbatch from its forward to its backward.
        in_flight: microbatches in flight when the rank's activations peak.
        workspace: the additional peak within a microbatch's forward and backward.
        offloaded: page-locked memory of the host for what is offloaded of one microbatch.
    """

    number: int
    layers: range
    activations: int
    in_flight: int
    workspace: int
    offloaded: int


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes.

    Attributes:
        rank, pipeline: its number among all ranks, and on the pipeline axis.
        parameters: number of local trained elements.
        resident: memory held throughout the run, by part; among them the quantised experts, which
            are freed during the update.
        microbatches: inputs of all microbatches of a step (ids, targets, layout, RoPE tables), as
            if all existed at once.
        stages: activations of its stages.
        update: the additional peak in the optimizer's step.
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
        """Bytes of all microbatches in flight."""
        return sum(stage.activations * stage.in_flight for stage in self.stages)

    @property
    def offloaded(self) -> int:
        """Page-locked bytes of the host for activations of all microbatches in flight."""
        return sum(stage.offloaded * stage.in_flight for stage in self.stages)

    @property
    def workspace(self) -> int:
        """The largest workspace of its stages."""
        return max(stage.workspace for stage in self.stages)

    @property
    def passes(self) -> int:
        """The peak of forward and backward; quantised experts are freed before the update."""
        of_microbatches = self.microbatches + self.activations + self.workspace
        return of_microbatches + self.resident.get(QUANTISED, 0)

    @property
    def total(self) -> int:
        """The peak of a step."""
        lasting = sum(size for name, size in self.resident.items() if name != QUANTISED)
        return lasting + max(self.passes, self.update)


@dataclass(frozen=True)
class DryRun:
    """The counted ranks of every pipeline rank: the first, the last, and the one with most state.

    Attributes:
        parameters: elements over all ranks, each logical one counted once.
        microbatches: number per rank and step.
        phase: the phase of these microbatches.
        triton: bytes that Triton's attention adds to every rank's peak where it is used.
    """

    degrees: Degrees
    ranks: list[RankMemory]
    parameters: int
    microbatches: int
    phase: Phase
    triton: int

    @property
    def fullest(self) -> RankMemory:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.total)


class EvenDispatch(ExpertDispatch):
    """Dispatch with even routing: tensors without values have no counts."""

    def begin_counts(self, destination_L: Tensor, local_experts: int) -> Callable[[], Counts]:
        """Returns counts as if all ranks had selected each expert equally often."""
        rows, size = len(destination_L), self.axis.size
        send = [rows // size + (rank < rows % size) for rank in range(size)]
        received_Re = destination_L.new_empty(size, local_experts)
        return lambda: (received_Re, send, [send[self.axis.rank]] * size)


def count_memory(
    config: RunConfig, world: int, progress: Progress | None = None, phase: int | None = None
) -> DryRun:
    """Builds ranks of every pipeline rank of `world` processes in turn, and counts their memory.

    Microbatches are those of the run's `phase`, by default of the one with the largest.
    `progress` is called with the ranks done and their number. Raises ConfigError if the config does
    not fit the processes, RuntimeError inside a process group.
    """
    degrees = config.degrees(world)
    stage_ranks = degrees.world_size // degrees.pipeline
    places = []
    for pipeline in range(degrees.pipeline):
        chosen = {0, stage_ranks - 1, pipeline_rank_memory(config, degrees, pipeline).fullest}
        places += [pipeline * stage_ranks + rank for rank in sorted(chosen)]
    known: _Known = {}
    planned = config.segment.largest if phase is None else config.recipe.phases[phase]
    ranks, elements = [], {}
    for number, rank in enumerate(places):
        with as_rank(rank, degrees) as grid:
            one = _Rank(config, grid, planned)
            ranks.append(one.memory(known))
            elements.update(one.elements())
        if progress is not None:
            progress(number + 1, len(places))
    parameters = sum(elements.values())
    return DryRun(
        degrees,
        ranks,
        parameters,
        microbatches_of(planned, degrees),
        planned,
        triton_workspace(config, degrees),
    )


@contextmanager
def as_rank(rank: int, degrees: Degrees) -> Iterator[Grid]:
    """Yields the grid of `rank` on the meta device; its collectives move nothing."""
    if degrees.world_size == 1:
        yield Grid.build(degrees, META)
        return
    if dist.is_initialized():
        raise RuntimeError("a dry run makes its own process groups, but some exist already")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world_size)
    try:
        with warnings.catch_warnings(action="ignore"):  # of collectives without a device
            yield Grid.build(degrees, META)
    finally:
        dist.destroy_process_group()


def microbatches_of(phase: Phase, degrees: Degrees) -> int:
    """Returns the microbatches per rank and step."""
    rows = phase.rows
    return -(-rows.global_batch_size // degrees.data // rows.micro_batch_size)


@dataclass(frozen=True)
class _PieceMemory:
    """Activations of a microbatch from its forward to its backward, and the additional peak.

    `offloaded` activations are on the host.
    """

    activations: int
    workspace: int
    offloaded: int


_Piece = Callable[[Tensor], list[Tensor]]
_Known = dict[tuple[object, ...], _PieceMemory]
"""Counted memory, by what makes pieces of stages equal."""


class _Rank:
    """One rank's model, gradients and optimizer on the meta device."""

    def __init__(self, config: RunConfig, grid: Grid, phase: Phase) -> None:
        self.config, self.grid, self.phase = config, grid, phase
        dispatch = EvenDispatch(grid) if grid.expert_all_to_all.size > 1 else None
        self.local: LocalModel = make_local(config, grid, dispatch)
        self.optimizer = make_optimizer(config, self.local, grid)
        self.engine: NativeEngine = NativeEngine(self.local, grid)
        self.engine.gradients.zero_()
        self.engine.quantisation = phase.quantisation

    def elements(self) -> dict[str, int]:
        """Returns the elements of every local parameter over all ranks of the stage, each once."""
        ranks = self.grid.world_size // self.grid.pipeline.size
        return {
            name: parameter.numel() * ranks // self.local.placements[name].replicas
            for name, parameter in self.local.model.named_parameters()
        }

    def memory(self, known: _Known) -> RankMemory:
        """Counts this rank's memory; pieces in `known` are not counted again."""
        with self.engine.computing():
            return self._memory(known)

    def _memory(self, known: _Known) -> RankMemory:
        micro = self._microbatch()
        numbers = self.local.stages.stages_of(self.grid.pipeline.rank)
        needs = {number: self._stage(number, micro, known) for number in numbers}
        activations = {number: need.activations for number, need in needs.items()}
        in_flight = self._in_flight(activations, len(micro.tokens_T))
        stages = [
            StageMemory(
                number,
                self.local.stages.layers_of(number),
                need.activations,
                in_flight[number],
                need.workspace,
                need.offloaded,
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
        if experts := rounded_weights(self.local.model):
            parts[QUANTISED] = Storages(experts).nbytes
        return parts

    def _microbatch(self) -> Microbatch:
        """Makes a microbatch of rows that are one sample each."""
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

    def _stage(self, number: int, micro: Microbatch, known: _Known) -> _PieceMemory:
        """Counts a microbatch's memory in a stage: the sum over its layers and its ends."""
        model, plan, axis = self.config.model, self.local.stages, self.grid.sequence
        pieces: dict[object, _Piece] = {}
        counts: Counter[object] = Counter()
        for layer in plan.layers_of(number):
            kind: object = (model.layer_types[layer], layer < model.num_hash_layers)
            pieces.setdefault(kind, partial(self._layer, layer, micro))
            counts[kind] += 1
        if number == 0:
            pieces["embedding"] = lambda streams: [self.local.model.embed_streams(micro)]
        if plan.is_last(number):
            pieces["heads"] = partial(self._heads, micro)
        activations = 0 if number == 0 else self._streams(micro).nbytes
        workspace = offloaded = 0
        for kind, piece in pieces.items():
            key = (kind, axis.is_first, axis.is_last)
            if key not in known:
                known[key] = self._measure(piece, micro)
            activations += known[key].activations * (counts[kind] or 1)
            offloaded += known[key].offloaded * (counts[kind] or 1)
            workspace = max(workspace, known[key].workspace)
        if "block" in self.config.segment.parallel.offload:
            # The layers' inputs are on the host, except the one from the previous stage; but one,
            # which may be the MTP block's, is on its way while the layer after it is in backward.
            moved = max(len(plan.layers_of(number)) - (number > 0), 0)
            has_mtp = plan.is_last(number) and model.num_nextn_predict_layers > 0
            activations -= (moved - (moved > 0 or has_mtp)) * self._streams(micro).nbytes
        return _PieceMemory(activations, workspace, offloaded)

    def _layer(self, index: int, micro: Microbatch, streams: Tensor) -> list[Tensor]:
        model = self.local.model
        out, stats = model.run_blocks(streams, micro, [model.layers[index]])
        losses = (model.weighted_balance(stats), model.indexer_loss(stats))
        return [out, *(loss for loss in losses if loss is not None)]

    def _heads(self, micro: Microbatch, streams: Tensor) -> list[Tensor]:
        model = self.local.model
        lm, mtp, stats = model.losses(streams, micro)
        balance = model.weighted_balance(stats)
        return [lm + micro.mtp_loss_weight * mtp + (0.0 if balance is None else balance)]

    def _measure(self, piece: _Piece, micro: Microbatch) -> _PieceMemory:
        """Counts one piece of a stage without its input streams."""
        model = self.local.model
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        streams = self._streams(micro)
        lasting = [*model.parameters(), *model.buffers(), *rounded_weights(model), *grads]
        lasting += [*tensors_in(micro), streams]
        before = self._host_bytes()
        with Live(Storages(lasting)) as live, GroupedShapes(), Addresses():
            out = piece(streams)
            activations = live.now
            torch.autograd.backward(out, [torch.empty_like(tensor) for tensor in out])
        return _PieceMemory(activations, live.peak - activations, self._host_bytes() - before)

    def _host_bytes(self) -> int:
        """Returns what all parts of the model have moved to the host so far."""
        call_part = self.local.model.execution.call_part
        return call_part.host.meta_bytes if isinstance(call_part, ActivationCheckpointing) else 0

    def _streams(self, micro: Microbatch) -> Tensor:
        """Makes the residual streams between two layers."""
        model = self.config.model
        shape = (len(micro.tokens_T), model.hc_mult, model.hidden_size)
        dtype = DTYPES[self.config.precision]
        return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)

    def _in_flight(self, activations: dict[int, int], tokens: int) -> dict[int, int]:
        """Returns the microbatches in flight by stage when activations peak."""
        pipeline = self.engine.pipeline
        if pipeline.axis.size == 1:
            return dict.fromkeys(activations, 1)
        schedule = pipeline.schedule(microbatches_of(self.phase, self.grid.degrees), tokens)
        return peak_in_flight(schedule.pipeline_order[pipeline.axis.rank], activations)

    def _update(self) -> int:
        """Counts the additional peak of the gradient reduction and the optimizer's step."""
        parameters = list(self.local.model.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        states = [piece.tensor for piece in self.optimizer.states()]
        with Live(Storages([*parameters, *grads, *states, *self.optimizer.owned()])) as live:
            self.optimizer.reduce()
            self.optimizer.step(1e-4)
        return live.peak


def resident(model: V4Model, optimizer: HybridZero) -> dict[str, int]:
    """Returns the bytes that a rank holds throughout the run, by part."""
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
