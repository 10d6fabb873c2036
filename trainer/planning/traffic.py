"""Bytes that every rank sends in one optimizer step, in closed form. Imports no torch.

A run counts the same numbers (`grid.traffic`), and a test compares them. An all-gather and the
reduce-scatter that is its adjoint send the same, whichever is in forward.

Letters:

    n  ranks of an axis        t  tensor ranks            c  context ranks
    s  sequence ranks, t·c     B  rows of a microbatch    S  tokens of a row
    T  local tokens, B·S/s     A  active experts          e  bytes per element, compute dtype
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from model.config import LayerType, ModelConfig
from model.parameters import Shapes, always_fp32, parameter_table
from optim import OptimConfig, build_table
from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates_of
from trainer.parallel.placement import placements_of
from trainer.parallel.ring import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from trainer.parallel.stage_plan import StagePlan, embedding_is_replicated
from trainer.parallel.zero_layout import ShardGroup, group_ranks, shard_groups
from trainer.planning.static_memory import stage_tensors

Lengths = Sequence[Sequence[int]]
"""Lengths of the samples of every row of a microbatch."""


@dataclass(frozen=True)
class ExpertRows:
    """Rows that a rank sends to other ranks' experts, and receives for its local ones.

    Over all layers and microbatches of a step, each counted once even if it is recomputed.
    """

    sent: float
    received: float


@dataclass(frozen=True)
class Work:
    """The work of a rank between two updates.

    Attributes:
        seq_len: S.
        microbatches: sample lengths of each, by row.
        precision: the compute dtype.
        recompute: as in the config; recomputed collectives are sent again.
        attention: of the phase; `warmup` has no formula.
        expert_rows: None means even routing: T·A·p·(n-1)/n rows a layer and microbatch each way,
            for p expert_tensor ranks, and n = p·expert.
    """

    seq_len: int
    microbatches: Sequence[Lengths]
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Collection[str] = ()
    expert_rows: ExpertRows | None = None
    attention: Literal["select", "dense", "sparse"] = "select"

    @classmethod
    def whole_rows(
        cls,
        seq_len: int,
        micro_batch_size: int,
        microbatches: int,
        precision: Literal["fp32", "bf16"] = "bf16",
        recompute: Collection[str] = (),
        attention: Literal["select", "dense", "sparse"] = "select",
    ) -> Work:
        """Returns the work of a step in which every row is one sample and routing is even."""
        one = [[seq_len]] * micro_batch_size
        return cls(seq_len, [one] * microbatches, precision, recompute, attention=attention)


@dataclass(frozen=True)
class GradientReduction:
    """How gradients are reduced and divided among owners, as in the config."""

    grad_reduce_dtype: str = "fp32"
    expert_grad_reduce_dtype: str = "fp32"
    max_padding: float = 0.1


def step_traffic(
    config: ModelConfig,
    degrees: Degrees,
    stages: StagePlan,
    rank: int,
    work: Work,
    optim: OptimConfig | None = None,
    reduction: GradientReduction | None = None,
) -> dict[tuple[str, str], int]:
    """Returns the bytes that `rank` sends in one step, by (axis, collective), without zeros.

    Includes forward and backward, the gradient norm, and the update, but not evaluation,
    checkpoints, or the messages of torch's pipelining when a schedule is made. Raises ValueError
    for a sparse phase with tensor parallelism in which every query attends to all entries: there
    the KL target is summed in blocks whose size depends on the device.
    """
    sent = _Sent(config, degrees, stages, rank, work)
    counts = Counter(tuple(map(tuple, lengths)) for lengths in work.microbatches)
    for lengths, count in counts.items():
        before = sent.bytes.copy()
        sent.microbatch(lengths)
        for key in sent.bytes:
            sent.bytes[key] += (count - 1) * (sent.bytes[key] - before[key])
    if work.expert_rows is not None:
        sent.expert_rows(work.expert_rows)
    sent.world()
    tensors = stage_tensors(config, stages, sent.coordinates["pipeline"]).items()
    shapes = {name: line.shape for name, line in tensors if line.spec.group is not None}
    sent.update(shapes, optim or OptimConfig(), reduction or GradientReduction())
    return {key: round(size) for key, size in sent.bytes.items() if size}


@dataclass
class _Sent:
    """Adds up the bytes that one rank sends."""

    config: ModelConfig
    degrees: Degrees
    stages: StagePlan
    rank: int
    work: Work
    bytes: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        degrees = self.degrees
        self.coordinates = coordinates_of(self.rank, DENSE_AXES, degrees)
        expert = coordinates_of(self.rank, EXPERT_AXES, degrees)
        self.ranks = {
            "tensor": degrees.tensor,
            "context": degrees.context,
            "sequence": degrees.tensor * degrees.context,
            "data": degrees.data,
            "stage": degrees.world_size // degrees.pipeline,
            "tensor_replicas": degrees.context * degrees.data,
            "expert_all_to_all": degrees.expert * degrees.expert_tensor,
            "expert_tensor": degrees.expert_tensor,
            "expert_data": degrees.expert_data,
            "embedding": 2,
            "world": degrees.world_size,
        }
        self.coordinates |= expert | {
            "sequence": self.coordinates["context"] * degrees.tensor + self.coordinates["tensor"]
        }
        self.element = {"fp32": 4, "bf16": 2}[self.work.precision]
        self.mtp = self.config.num_nextn_predict_layers
        # Runs of forward; `attention` and `block` recompute it in backward.
        self.block_runs = 1 + ("block" in self.work.recompute)
        self.attention_runs = self.block_runs + ("attention" in self.work.recompute)

    def _all_reduce(self, axis: str, total: float) -> None:
        self.bytes[axis, "all_reduce"] += all_reduce_bytes(self.ranks[axis], total)

    def _all_gather(self, axis: str, part: float, forward: int = 1, backward: int = 1) -> None:
        """Counts an all-gather in forward; backward reduce-scatters the gradients."""
        ranks = self.ranks[axis]
        self.bytes[axis, "all_gather"] += forward * all_gather_bytes(ranks, part)
        self.bytes[axis, "reduce_scatter"] += backward * reduce_scatter_bytes(ranks, ranks * part)

    def _reduce_scatter(self, axis: str, part: float, forward: int = 1, backward: int = 1) -> None:
        """Counts a reduce-scatter in forward, `part` to each; backward all-gathers gradients."""
        ranks = self.ranks[axis]
        self.bytes[axis, "reduce_scatter"] += forward * reduce_scatter_bytes(ranks, ranks * part)
        self.bytes[axis, "all_gather"] += backward * all_gather_bytes(ranks, part)

    def microbatch(self, lengths: Lengths) -> None:
        """Counts forward and backward of this rank's stages."""
        rows = [*map(self._with_padding, lengths)]
        tokens = len(rows) * self.work.seq_len // self.ranks["sequence"]
        for number in self.stages.stages_of(self.coordinates["pipeline"]):
            if number == 0:
                self._embedding(tokens)
            for layer in self.stages.layers_of(number):
                self._attention(self.config.layer_types[layer], rows, tokens)
                self._experts(layer >= self.config.num_hash_layers, rows, tokens)
            if self.stages.is_last(number):
                self._head(tokens)
                for _ in range(self.mtp):
                    self._embedding(tokens)
                    self._attention("window", rows, tokens)
                    self._experts(True, rows, tokens)
                    self._head(tokens)
            self._streams(number, tokens)

    def _with_padding(self, row: Sequence[int]) -> list[int]:
        """Returns the row's lengths with its padding as one more sample."""
        rest = self.work.seq_len - sum(row)
        return [*row, rest] if rest else [*row]

    def _embedding(self, tokens: int) -> None:
        """Each tensor rank has a part of the vocabulary: a sum; backward gathers gradients."""
        size = self.config.hidden_size * self.element
        self._all_reduce("tensor", self.degrees.tensor * tokens * size)
        self._reduce_scatter("tensor", tokens * size, forward=0)

    def _head(self, tokens: int) -> None:
        """Gathers hidden states; per token sums a maximum, a sum and the target's logit.

        Each tensor rank has the logits of a part of the vocabulary. The gradient is computed in
        forward and sends nothing more.
        """
        self._all_gather("tensor", tokens * self.config.hidden_size * self.element)
        self._all_reduce("tensor", self.degrees.tensor * tokens * 3 * 4)

    def _attention(self, kind: LayerType, rows: Lengths, tokens: int) -> None:
        config, e, runs = self.config, self.element, self.attention_runs
        width = config.head_dim
        self._all_gather("tensor", tokens * config.q_lora_rank * e, runs)  # low-rank queries
        self._all_gather("tensor", tokens * width * e, runs)  # key-values
        if self.degrees.context > 1:
            self._halo("context", config.sliding_window - 1, len(rows) * width * e, runs)
        if kind != "window":
            self._entries(kind, rows, width, runs)
        if kind == "csa" and self.work.attention != "dense":
            self._index(rows, tokens)
        # Backward does not need this result, so recomputed attention ends before it.
        self._reduce_scatter("tensor", tokens * config.hidden_size * e, self.block_runs)

    def _index(self, rows: Lengths, tokens: int) -> None:
        """Counts the indexer's entries and selected indices; if it trains, gradients and KL target.

        Tensor ranks sum the attention mass of their heads on each selected entry. The selection
        itself has no gradient.
        """
        runs = self.attention_runs
        learns, selects = self.work.attention == "sparse", self._selects(rows)
        if learns or selects:
            self._entries("csa", rows, self.config.index_head_dim, runs, backward=int(learns))
        selected = tokens * self.config.index_topk * 4
        if selects:
            self._all_gather("tensor", selected, runs, backward=0)
        if learns and selects:
            self._reduce_scatter("tensor", selected, runs, backward=0)
        elif learns and self.degrees.tensor > 1:
            raise ValueError("no formula for the KL target of queries that attend to every entry")

    def _selects(self, rows: Lengths) -> bool:
        """Whether any query sees more entries than the indexer selects."""
        longest = max(length for row in rows for length in row)
        return longest // self.config.csa_compress_ratio > self.config.index_topk

    def _halo(self, axis: str, tokens: int, size: float, forward: int, backward: int = 1) -> None:
        """Counts the halo, tokens before every row's local run; `size` counts all rows.

        Later ranks need at most the tokens of this rank and those before them; the first rank
        receives nothing, the last sends nothing. Backward sends gradients the other way.
        """
        run = self.work.seq_len // self.ranks[axis]
        before, after = self.coordinates[axis], self.ranks[axis] - 1 - self.coordinates[axis]
        sent, received = (min(tokens, run * ranks) for ranks in (after, before))
        self.bytes[axis, "all_to_all"] += (forward * sent + backward * received) * size

    def _entries(
        self, kind: LayerType, rows: Lengths, width: int, forward: int, backward: int = 1
    ) -> None:
        """Counts a compressor's entries: a halo of values and gates in fp32, a gather."""
        if self.ranks["sequence"] == 1:
            return
        ratio, overlap = self.config.compress_ratio(kind), 1 + (kind == "csa")
        halo = overlap * ratio - 1
        self._halo("sequence", halo, len(rows) * 2 * overlap * width * 4, forward, backward)
        size = self._most_entries(rows, ratio) * width * self.element
        self._all_gather("sequence", size, forward, backward)

    def _most_entries(self, rows: Lengths, ratio: int) -> int:
        """Returns the entries of the rank with most of them; all ranks send as many."""
        run = self.work.seq_len // self.ranks["sequence"]
        owned = np.zeros(self.ranks["sequence"], dtype=np.int64)
        for row in rows:
            start = 0
            for length in row:
                last = np.arange(start + ratio - 1, start + length, ratio)
                owned += np.bincount(last // run, minlength=len(owned))
                start += length
        return int(owned.max())

    def _experts(self, learned: bool, rows: Lengths, tokens: int) -> None:
        config, runs, size = self.config, self.block_runs, self.config.hidden_size * self.element
        self._all_gather("tensor", tokens * size, runs)  # the shared expert's input
        self._reduce_scatter("tensor", tokens * size, runs)
        if learned:
            samples = sum(map(len, rows))
            self._all_reduce("sequence", runs * samples * config.n_routed_experts * 4)
        ranks = self.ranks["expert_all_to_all"]
        counts = config.n_routed_experts // self.degrees.expert * 8
        self.bytes["expert_all_to_all", "all_to_all"] += runs * (ranks - 1) * counts
        if self.work.expert_rows is None:
            away = tokens * config.num_experts_per_tok * self.degrees.expert_tensor
            self.expert_rows(ExpertRows(*[away * (ranks - 1) / ranks] * 2))

    def expert_rows(self, rows: ExpertRows) -> None:
        """Counts rows with fp32 weights to the experts and results back, and their gradients."""
        if self.ranks["expert_all_to_all"] == 1:
            return
        size = self.config.hidden_size * self.element
        forward = rows.sent * (size + 4) + rows.received * size
        backward = rows.received * (size + 4) + rows.sent * size
        self.bytes["expert_all_to_all", "all_to_all"] += self.block_runs * forward + backward

    def _streams(self, number: int, tokens: int) -> None:
        """Counts residual streams to the next stage, and gradients to the previous one."""
        config, local = self.config, self.stages.stages_of(self.coordinates["pipeline"])
        for other in (number - 1, number + 1):
            if 0 <= other < len(self.stages.layer_counts) and other not in local:
                size = tokens * config.hc_mult * config.hidden_size * self.element
                self.bytes["pipeline", "send"] += size

    def world(self) -> None:
        """Counts sums once per step: of fp64 numbers, six and one of each rank for the counts and
        messages, four losses and the norm; of fp32 numbers, the loads of experts."""
        routers = self.config.num_hidden_layers + self.mtp
        loads = routers * (self.config.n_routed_experts + 1) * 4
        messages = (6 + self.degrees.world_size) * 8
        self._all_reduce("world", messages + 4 * 8 + loads + 8)

    def update(self, shapes: Shapes, optim: OptimConfig, how: GradientReduction) -> None:
        """Gradients to their owners and parameters back, for each group of parameters."""
        placements = placements_of(shapes, self.degrees, self.rank)
        matrix_shapes = {name: placement.table_shape for name, placement in placements.items()}
        low_precision = {name for name in shapes if self.element < 4 and not always_fp32(name)}
        is_replicated = embedding_is_replicated(self.stages, self.mtp)
        for group in shard_groups(
            build_table(matrix_shapes, parameter_table(self.config), optim),
            placements,
            low_precision,
            self.degrees,
            is_replicated,
            optim.muon,
            how.max_padding,
        ):
            self._group(group, how)

    def _group(self, group: ShardGroup, how: GradientReduction) -> None:
        layout, replicas = group.layout, group.replicas
        axis, shard_axis = _AXES[group.kind]
        back = 2 if group.is_low_precision else 4
        name = f"{axis}/{layout.owners}"
        is_expert = group.kind == "expert"
        precision = how.expert_grad_reduce_dtype if is_expert else how.grad_reduce_dtype
        owners, size = layout.owners, layout.partition_size
        if precision == "fp32":
            sent = reduce_scatter_bytes(owners, owners * size * 4)
            self.bytes[name, "reduce_scatter"] += sent
        else:
            self.bytes[name, "all_to_all"] += (owners - 1) * size * 2
        self.bytes[name, "all_gather"] += all_gather_bytes(owners, size * back)
        self.bytes[f"{axis}*{replicas}", "all_reduce"] += all_reduce_bytes(replicas, size * 4)
        if group.kind == "embedding":
            self.bytes["embedding", "all_reduce"] += all_reduce_bytes(2, size * 4)
        index, assembly_rank = group_ranks(self.degrees, self.rank)[group.kind]
        owner = index % layout.owners
        sharded = [s for s in layout.slices if s.owner == owner and s.assembly_rank is not None]
        away = sum(s.size for s in sharded if s.assembly_rank != assembly_rank)
        local = sum(s.size for s in sharded if s.assembly_rank == assembly_rank)
        self.bytes[shard_axis, "all_to_all"] += (
            away * 4 + local * (layout.num_shard_ranks - 1) * back
        )


_AXES = {
    "replicated": ("stage", "trivial"),
    "tensor": ("tensor_replicas", "tensor"),
    "expert": ("expert_data", "expert_tensor"),
    "embedding": ("tensor_replicas", "tensor"),
}
"""By kind of group, the axis that holds the same shard and the one that shards."""
