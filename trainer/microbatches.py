"""A microbatch's rows on the device, copied there beside what it still computes.

A step's rows are copied on a stream of their own, from page-locked memory: while the update of the
step before runs, and while earlier microbatches do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import Batch
from model import SampleLayout, TokenCounts, V4Model
from model.config import AttentionMode
from model.transformer import Microbatch

SelectedExperts = Mapping[int, Tensor]
"""Of a microbatch: expert numbers [T, A] of the own tokens by layer, in any integer type."""


@dataclass(frozen=True)
class Rows:
    """Rows on the device, and on the host what they count.

    Attributes:
        tokens_BS, targets_BS, layout: to be read after `arrive`.
        counts: of these rows.
        arrived: recorded behind the copies.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    layout: SampleLayout
    counts: TokenCounts
    arrived: Any

    def arrive(self) -> None:
        """What is computed from here on waits for the copies; the host does not."""
        self.arrived.wait()


class RowCopies:
    """Copies batches to a device.

    Arguments:
        device: where to; a CPU and the meta device have one stream, which does nothing here.
        ratios: tokens of an entry in each kind of layer, for what goes there with the rows.
    """

    def __init__(self, device: torch.device, ratios: Sequence[int]) -> None:
        self.device, self.ratios = device, ratios
        self._module: Any = torch.get_device_module("cuda" if device.type == "cuda" else "cpu")
        self._stream = self._module.Stream()

    @contextmanager
    def rows(self, batches: Sequence[Batch]) -> Iterator[list[Rows]]:
        """The rows of some microbatches, on their way; they may be read inside the block.

        What they lie in is taken anew by later copies alone, and these wait for all that the
        device was told to compute inside the block.
        """
        with self._module.stream(self._stream):
            rows = [self._begin(batch) for batch in batches]
        yield rows
        self._stream.wait_stream(self._module.current_stream())

    def _begin(self, batch: Batch) -> Rows:
        length = batch.tokens.shape[1]
        here = there = SampleLayout.from_lengths(batch.lengths, length)
        if self.device.type != "cpu":
            there = SampleLayout.from_lengths(batch.lengths, length, self.device)
        for ratio in self.ratios:
            there.entries(ratio)
        tokens_BS = batch.tokens.to(self.device, non_blocking=True)
        targets_BS = batch.targets.to(self.device, non_blocking=True)
        arrived = self._module.Event()
        arrived.record()
        # Counts are made on the host: no wait for the device.
        return Rows(tokens_BS, targets_BS, there, TokenCounts.of(here, batch.targets), arrived)


class Microbatches(Sequence[Microbatch]):
    """Microbatches made when they are asked for: their rotations are large where rows are long."""

    def __init__(
        self,
        model: V4Model,
        rows: list[Rows],
        counts: TokenCounts,
        mtp_loss_weight: float,
        attention: AttentionMode,
        chosen: Sequence[SelectedExperts] | None = None,
    ) -> None:
        self.model, self.rows, self.attention = model, rows, attention
        self.counts, self.mtp_loss_weight = counts, mtp_loss_weight
        self.chosen = chosen or [{}] * len(rows)

    @property
    def tokens(self) -> int:
        """Positions of each of them, over all ranks that share its rows."""
        return self.rows[0].tokens_BS.numel()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self.rows[index]
        rows.arrive()
        return self.model.microbatch(
            rows.tokens_BS,
            rows.layout,
            rows.targets_BS,
            self.counts,
            self.mtp_loss_weight,
            self.chosen[index],
            self.attention,
        )
