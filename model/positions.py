"""What every layer needs to know about where its tokens are, computed once per microbatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import AttentionProbabilityMass
from model.layout import SampleLayout, on_device
from model.rope import layer_frequencies, rotation


@dataclass(frozen=True)
class Windows:
    """The windows that a compressor pools here: indices of tokens, and the entries' rotation."""

    first_token_C: Tensor
    has_previous_C: Tensor
    rotation_CR: Tensor


class Positions:
    """Rotations and visible ranges of a microbatch, by layer type, and the way to other tokens.

    A rank's *own* tokens are those whose residual streams it holds, its *queries* those whose
    attention it computes. Here both are all tokens of the microbatch, and every method that
    would bring tokens from elsewhere returns what it was given. Where rows are divided over ranks
    trainer/parallel swaps this class for one that communicates.

    Attributes:
        layout: the samples of the own tokens.
    """

    def __init__(self, config: ModelConfig, layout: SampleLayout) -> None:
        self.layout = layout
        self._ratio: dict[LayerType, int] = {
            kind: config.compress_ratio(kind) for kind in {*config.layer_types, "window"}
        }
        device = layout.position_T.device
        start = np.maximum(
            layout.host_start_T, np.arange(layout.num_tokens) - config.sliding_window + 1
        )
        start_T = on_device(start, device)
        plain = layer_frequencies(config, compressed=False, device=device)
        scaled = layer_frequencies(config, compressed=True, device=device)
        self._rotation: dict[bool, Tensor] = {False: rotation(layout.position_T, plain)}
        if any(self._ratio.values()):
            self._rotation[True] = rotation(layout.position_T, scaled)
        self._ranges: dict[LayerType, AttentionRanges] = {}
        self._windows: dict[LayerType, Windows] = {}
        whole = ((0, layout.num_tokens, 0),)
        for kind, ratio in self._ratio.items():
            if ratio == 0:
                self._ranges[kind] = AttentionRanges(start_T, whole)
                continue
            entries = layout.entries(ratio)
            self._ranges[kind] = AttentionRanges(
                start_T,
                whole,
                entries.start_T,
                entries.end_T,
                entries.host_start_T,
                entries.host_end_T,
            )
            self._windows[kind] = Windows(
                entries.first_token_C,
                entries.has_previous_C,
                rotation(entries.position_C, scaled),
            )

    def rotation(self, kind: LayerType) -> Tensor:
        """Complex [T, R/2] of the own tokens in a layer of this type."""
        return self._rotation[self._ratio[kind] > 0]

    def ranges(self, kind: LayerType) -> AttentionRanges:
        """The entries that own tokens see, and the tokens where own tokens are the queries."""
        return self._ranges[kind]

    def windows(self, kind: LayerType) -> Windows:
        """What is pooled here, in tokens of `with_previous`."""
        return self._windows[kind]

    def most_visible(self, kind: LayerType) -> int:
        """The largest number of entries that any query of the microbatch sees, on any rank."""
        return self.layout.entries(self._ratio[kind]).most_visible

    def query_rotation(self, kind: LayerType) -> Tensor:
        """Complex [T, R/2] of the queries."""
        return self.rotation(kind)

    def query_ranges(self, kind: LayerType) -> AttentionRanges:
        """What the queries see of `keys` and of `all_entries`."""
        return self.ranges(kind)

    def own(self, whole_T: Tensor) -> Tensor:
        """The own tokens' values of a vector over all tokens of the microbatch."""
        return whole_T

    def queries(self, whole_T: Tensor) -> Tensor:
        """The queries' values of a vector over all tokens of the microbatch."""
        return whole_T

    def to_queries(self, own_TX: Tensor) -> Tensor:
        """From own tokens to queries."""
        return own_TX

    def pick_own(self, query_TX: Tensor) -> Tensor:
        """From what is whole at all queries to the own tokens."""
        return query_TX

    def to_own(self, partial_TX: Tensor) -> Tensor:
        """From the queries' partial sums over heads to the own tokens' whole sums."""
        return partial_TX

    def keys(self, own_TK: Tensor) -> Tensor:
        """From own tokens to all that a query's window may reach, in the order of the ranges."""
        return own_TK

    def with_previous(
        self, kind: LayerType, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A compressor's inputs of the own tokens and of those before them that windows reach."""
        return values_TX, gates_TX

    def all_entries(self, kind: LayerType, pooled_CK: Tensor) -> Tensor:
        """From the windows pooled here to the microbatch's entries, sample after sample."""
        return pooled_CK

    def own_mass(
        self, kind: LayerType, mass: AttentionProbabilityMass, listed: bool
    ) -> AttentionProbabilityMass:
        """From the attention that queries gave over the heads at hand to own tokens' over all.

        Where it is not `listed` which entries a query chose, its columns are those it may see.
        """
        return mass

    def sum_counts(self, counts_SE: Tensor) -> Tensor:
        """Sum counts by sample over the ranks that hold tokens of the same samples."""
        return counts_SE


MakePositions = Callable[[ModelConfig, SampleLayout], Positions]
