"""Rotary angles and visible ranges of a microbatch's tokens, computed once for all layers.

Data only; model/exchange.py defines *local* tokens and *queries* and communicates.

Letters: T tokens, C compressed entries, R rotated dims, r = R/2 complex numbers that rotate them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.layout import SampleLayout, on_device
from model.rope import layer_frequencies, rotation


@dataclass(frozen=True)
class CompressionWindows:
    """The windows that a rank's compressor pools: token indices, and rotations of the entries."""

    first_token_C: Tensor
    has_previous_C: Tensor
    rotation_Cr: Tensor


@dataclass(frozen=True)
class TokenPositions:
    """Rotations and visible ranges of some tokens.

    Attributes:
        rotations: complex [T, r], by whether the layer has a compressor.
        ranges: the tokens and entries that each token sees, by layer type.
    """

    rotations: Mapping[bool, Tensor]
    ranges: Mapping[LayerType, AttentionRanges]


@dataclass(frozen=True)
class Positions:
    """Positions of a rank's local tokens and queries, by layer type.

    Attributes:
        layout: the samples of the local tokens.
        microbatch: the samples of all tokens of the microbatch.
        ratios: compression ratio m of each layer type, 0 for window layers.
        local, queries: rotations and ranges of these tokens. Ranges index keys in the order of
            `Exchange.gather_keys`. Where rows are sharded, key ranges of `local` are meaningless;
            use those of `queries`.
        windows_by_type: the windows that this rank pools, by layer type.
    """

    layout: SampleLayout
    microbatch: SampleLayout
    ratios: Mapping[LayerType, int]
    local: TokenPositions
    queries: TokenPositions
    windows_by_type: Mapping[LayerType, CompressionWindows]

    @classmethod
    def of_microbatch(cls, config: ModelConfig, layout: SampleLayout) -> Positions:
        """Positions on one process, where local tokens and queries are all tokens."""
        ratios = compress_ratios(config)
        device = layout.position_T.device
        start = np.maximum(
            layout.host_start_T, np.arange(layout.num_tokens) - config.sliding_window + 1
        )
        start_T = on_device(start, device)
        frequencies = {
            # On the host: a few numbers, and a dozen launches.
            compressed: on_device(layer_frequencies(config, compressed=compressed).numpy(), device)
            for compressed in sorted({False} | {ratio > 0 for ratio in ratios.values()})
        }
        rotations = {c: rotation(layout.position_T, f) for c, f in frequencies.items()}
        segments = ((0, layout.num_tokens, 0),)
        ranges: dict[LayerType, AttentionRanges] = {}
        windows: dict[LayerType, CompressionWindows] = {}
        for kind, ratio in ratios.items():
            if ratio == 0:
                ranges[kind] = AttentionRanges(start_T, segments)
                continue
            entries = layout.entries(ratio)
            ranges[kind] = AttentionRanges(
                start_T,
                segments,
                entries.start_T,
                entries.end_T,
                entries.host_start_T,
                entries.host_end_T,
            )
            windows[kind] = CompressionWindows(
                entries.first_token_C,
                entries.has_previous_C,
                rotation(entries.position_C, frequencies[True]),
            )
        tokens = TokenPositions(rotations, ranges)
        return cls(layout, layout, ratios, tokens, tokens, windows)

    def rotation(self, kind: LayerType) -> Tensor:
        """Complex [T, r] of the local tokens in a layer of this type."""
        return self.local.rotations[self.ratios[kind] > 0]

    def ranges(self, kind: LayerType) -> AttentionRanges:
        """Entry ranges of the local tokens; their key ranges are valid on one process only."""
        return self.local.ranges[kind]

    def query_rotation(self, kind: LayerType) -> Tensor:
        """Complex [T, r] of the queries."""
        return self.queries.rotations[self.ratios[kind] > 0]

    def query_ranges(self, kind: LayerType) -> AttentionRanges:
        """Ranges of the gathered keys and entries that the queries see."""
        return self.queries.ranges[kind]

    def windows(self, kind: LayerType) -> CompressionWindows:
        """The windows that this rank pools; they index the result of `Exchange.prepend_halo`."""
        return self.windows_by_type[kind]

    def max_visible(self, kind: LayerType) -> int:
        """The largest number of entries that any query of the microbatch sees, on any rank."""
        return self.microbatch.entries(self.ratios[kind]).max_visible


def compress_ratios(config: ModelConfig) -> dict[LayerType, int]:
    """The compression ratio m of each layer type, the MTP block's included."""
    return {kind: config.compress_ratio(kind) for kind in {*config.layer_types, "window"}}
