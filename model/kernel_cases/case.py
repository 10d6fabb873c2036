"""What an operation is compared and timed on: inputs, implementations, and the minimum of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.kernels.operations import EAGER, Choice
from model.layout import SampleLayout
from model.positions import Positions

RAGGED = (1, 2, 129, 1000, 3, 4, 70)
"""Sample lengths that leave every block of queries, of keys and of entries incomplete somewhere."""

Blocks = Mapping[str, int]
"""Block sizes of a Triton kernel, by the names of its arguments; empty for its defaults."""
Function = Callable[..., Any]
"""An implementation: the case's leaves to one tensor, or to a tuple of several."""


@dataclass(frozen=True)
class Work:
    """The minimum FLOPs and bytes of one pass."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Sizes:
    """What the cases of an operation are built from.

    Attributes:
        config: the model's widths.
        samples: lengths of the samples of one packed row: its tokens on one rank.
        dtype: of activations and weights.
        device: where the inputs are made.
        seed: of the inputs' random numbers.
        deterministic: whether the run demands deterministic algorithms.
        dense: whether naive implementations, which take memory quadratic in the number of tokens
            or loop over rows, run at this size.
        tensor, expert_tensor: ranks that share the shared expert's and a routed expert's inner
            width.
        earlier: tokens of the only sample that come before those in `samples`, as on the last of
            several context-parallel ranks: their entries are seen.
    """

    config: ModelConfig
    samples: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    deterministic: bool = False
    dense: bool = False
    tensor: int = 1
    expert_tensor: int = 1
    earlier: int = 0

    @property
    def shared_inner(self) -> int:
        """F of the shared expert on one rank."""
        return self.config.moe_intermediate_size // self.tensor

    @property
    def routed_inner(self) -> int:
        """F of a routed expert on one rank."""
        return self.config.moe_intermediate_size // self.expert_tensor

    @property
    def tokens(self) -> int:
        """T, the sum of the samples."""
        return sum(self.samples)

    @property
    def layout(self) -> SampleLayout:
        """The layout of the samples."""
        return SampleLayout.from_lengths([self.samples], device=self.device)

    @property
    def row_layout(self) -> SampleLayout:
        """The layout of the samples and of the earlier tokens."""
        if not self.earlier:
            return self.layout
        return SampleLayout.from_lengths([[self.earlier + self.tokens]], device=self.device)

    def entries(self, kind: LayerType) -> int:
        """Returns the number of entries that a layer of this type has."""
        return self.row_layout.entries(self.config.compress_ratio(kind)).count

    def ranges(self, kind: LayerType) -> AttentionRanges:
        """Returns what the tokens see: keys of their own, entries of the earlier ones as well."""
        ranges = Positions.of_microbatch(self.config, self.layout).ranges(kind)
        if not self.earlier or kind == "window":
            return ranges
        entries = self.row_layout.entries(self.config.compress_ratio(kind))
        first = self.earlier
        return AttentionRanges(
            ranges.window_start_T,
            ranges.segments,
            entries.start_T[first:],
            entries.end_T[first:],
            entries.host_start_T[first:],
            entries.host_end_T[first:],
        )

    def rotation(self, kind: LayerType) -> Tensor:
        """Returns the rotation of the tokens in a layer of this type, complex [T, r]."""
        return Positions.of_microbatch(self.config, self.row_layout).rotation(kind)[self.earlier :]

    def draw(self) -> Draw:
        """Returns a new source of random tensors, which starts from the seed."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return Draw(generator, self.dtype)


@dataclass(frozen=True)
class Draw:
    """Random tensors on the generator's device."""

    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Returns normal numbers times ``scale``, in the activations' dtype by default."""
        normal = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return (normal * scale).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns int64 numbers below ``high``."""
        device = self.generator.device
        return torch.randint(high, shape, generator=self.generator, device=device)

    def permutation(self, count: int) -> Tensor:
        """Returns the numbers below ``count`` in random order."""
        return torch.randperm(count, generator=self.generator, device=self.generator.device)

    def rotation(self, rows: int, dims: int) -> Tensor:
        """Returns unit complex numbers [rows, dims / 2], as RoPE's are."""
        angle = self(rows, dims // 2, dtype=torch.float32, scale=3.0)
        return torch.polar(torch.ones_like(angle), angle)


@dataclass(frozen=True)
class Selection:
    """How a selection of entries, int [T, k] with -1 for none, is judged.

    Attributes:
        scores: (leaves, rows) -> the scores of these queries and all entries, in the leaves' dtype.
        start_T, end_T: the range of entries that each query sees.
    """

    scores: Callable[[Sequence[Tensor], slice], Tensor]
    start_T: Tensor
    end_T: Tensor


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Attributes:
        name: e.g. "window layers"; the operation is named apart from it.
        leaves: the inputs by name. Gradients of all of them are compared if `differentiable`.
        naive: the readable implementation, for leaves in float64; None where `Sizes.dense` is off,
            or where the eager version is exact.
        function: (choice) -> that implementation. The eager one takes leaves in fp32 as well.
        outputs: names of the outputs.
        differentiable: whether every floating-point output has a gradient in every leaf.
        repeatable: whether Triton promises the same bits at every run.
        exact: whether outputs equal those of the eager version to the bit.
        rounds_within: whether numbers in between are rounded to the leaves' coarsest dtype, e.g. as
            operands of tensor cores, so that fp32 results are not as exact as fp32 sums.
        selection: set where the output is a selection of entries.
        weight: how often a pass of the model runs it, e.g. the number of layers; 0 if it is
            compared but not timed.
        forward, backward: the minimum of work; None where it is not known or not differentiable.
    """

    name: str
    leaves: Mapping[str, Tensor]
    function: Callable[[Choice], Function]
    naive: Function | None = None
    outputs: tuple[str, ...] = ("output",)
    differentiable: bool = True
    repeatable: bool = True
    exact: bool = False
    rounds_within: bool = False
    selection: Selection | None = None
    weight: float = 1.0
    forward: Work | None = None
    backward: Work | None = None

    @property
    def eager(self) -> Function:
        """The eager implementation."""
        return self.function(EAGER)


MakeCase = Callable[[], Case]
"""Only one case at a time fits in memory."""


def layers_of(config: ModelConfig, *kinds: LayerType) -> int:
    """Returns the number of layers of these types, the MTP blocks' window layers included."""
    types = [*config.layer_types, *["window"] * config.num_nextn_predict_layers]
    return sum(kind in kinds for kind in types)


def visible_entries(sizes: Sizes, kind: LayerType) -> np.ndarray:
    """Returns how many entries each token sees in a layer of this type, int [T]."""
    ranges = sizes.ranges(kind)
    return np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)


def random_selection(draw: Draw, start_T: Tensor, end_T: Tensor, k: int) -> Tensor:
    """Selects k of the entries that each query sees, or all if it sees no more, int32 [T, k]."""
    blocks = []
    for rows in torch.arange(len(start_T), device=start_T.device).split(1024):
        first, last = int(start_T[rows].min()), int(end_T[rows].max())
        index = torch.arange(first, first + max(last - first, k), device=start_T.device)
        order = draw(len(rows), len(index), dtype=torch.float32).abs_()
        sees = (index >= start_T[rows, None]) & (index < end_T[rows, None])
        best = order.masked_fill_(~sees, -1).topk(k)
        blocks.append((best.indices + first).masked_fill(best.values < 0, -1).int())
    return torch.cat(blocks)


def sees(index: Tensor, start_T: Tensor, end_T: Tensor) -> Tensor:
    """Returns whether each query sees each of the keys with these indices, bool [T, len(index)]."""
    return (index >= start_T[:, None]) & (index < end_T[:, None])
