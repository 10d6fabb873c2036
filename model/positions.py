"""What every layer needs to know about where its tokens are, computed once per microbatch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.config import LayerType, ModelConfig
from model.kernels.attention import AttentionRanges
from model.layout import Entries, SampleLayout
from model.rope import layer_frequencies, rotation


class Positions:
    """Rotations and visible ranges of a microbatch, by layer type."""

    def __init__(self, config: ModelConfig, layout: SampleLayout) -> None:
        self.layout = layout
        self._ratio: dict[LayerType, int] = {
            kind: config.compress_ratio(kind) for kind in {*config.layer_types, "window"}
        }
        device = layout.position_T.device
        start = np.maximum(
            layout.host_start_T, np.arange(layout.num_tokens) - config.sliding_window + 1
        )
        start_T = torch.from_numpy(start).to(device)
        plain = layer_frequencies(config, compressed=False, device=device)
        scaled = layer_frequencies(config, compressed=True, device=device)
        self._rotation: dict[bool, Tensor] = {False: rotation(layout.position_T, plain)}
        if any(self._ratio.values()):
            self._rotation[True] = rotation(layout.position_T, scaled)
        self._ranges: dict[LayerType, AttentionRanges] = {}
        self._entry_rotation: dict[LayerType, Tensor] = {}
        for kind, ratio in self._ratio.items():
            if ratio == 0:
                self._ranges[kind] = AttentionRanges(start_T, start)
                continue
            entries = layout.entries(ratio)
            self._ranges[kind] = AttentionRanges(
                start_T,
                start,
                entries.start_T,
                entries.end_T,
                entries.host_start_T,
                entries.host_end_T,
            )
            self._entry_rotation[kind] = rotation(entries.position_C, scaled)

    def rotation(self, kind: LayerType) -> Tensor:
        """Complex [T, R/2] of the tokens in a layer of this type."""
        return self._rotation[self._ratio[kind] > 0]

    def ranges(self, kind: LayerType) -> AttentionRanges:
        """The visible tokens and entries in a layer of this type."""
        return self._ranges[kind]

    def entries(self, kind: LayerType) -> Entries:
        """The compressed entries of a layer of this type."""
        return self.layout.entries(self._ratio[kind])

    def entry_rotation(self, kind: LayerType) -> Tensor:
        """Complex [C, R/2] of the entries, at the position of each window's first token."""
        return self._entry_rotation[kind]
