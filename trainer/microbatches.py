"""Microbatches: their rows are copied to the device while it still computes.

A step's rows are copied on a separate stream, from page-locked memory, during the update of the
previous step and during earlier microbatches.

Letters: B rows, S positions of a row, T local tokens, A experts per token.
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
from model.execution import Objective
from model.transformer import Microbatch

SelectedExperts = Mapping[int, Tensor]
"""Of a microbatch: expert indices [T, A] of the local tokens by layer, in any integer type."""


@dataclass(frozen=True)
class Rows:
    """Rows on the device, and their token counts on the host.

    Attributes:
        tokens_BS, targets_BS, layout: valid after `wait_for_copies`.
        signals: those of the batch, by name; valid then as well.
        counts: of these rows.
        copied: an event, recorded after the copies.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    signals: Mapping[str, Tensor]
    layout: SampleLayout
    counts: TokenCounts
    copied: Any

    def wait_for_copies(self) -> None:
        """Makes later work on the current stream wait for the copies; the host does not wait."""
        self.copied.wait()


class RowCopies:
    """Copies batches to a device.

    Arguments:
        device: of the copies; on a CPU and the meta device streams are no-ops.
        ratios: compression ratios of the layers, whose entries are copied with the rows.
    """

    def __init__(self, device: torch.device, ratios: Sequence[int]) -> None:
        self.device, self.ratios = device, ratios
        self._module: Any = torch.get_device_module("cuda" if device.type == "cuda" else "cpu")
        self._stream = self._module.Stream()

    @contextmanager
    def rows(self, batches: Sequence[Batch]) -> Iterator[list[Rows]]:
        """Starts to copy the rows of some microbatches; they are valid inside the block.

        Only later copies reuse their memory, and these wait for all work that was queued inside the
        block.
        """
        with self._module.stream(self._stream):
            rows = [self._start_copy(batch) for batch in batches]
        yield rows
        self._stream.wait_stream(self._module.current_stream())

    def _start_copy(self, batch: Batch) -> Rows:
        length = batch.tokens.shape[1]
        host_layout = layout = SampleLayout.from_lengths(batch.lengths, length)
        if self.device.type != "cpu":
            layout = SampleLayout.from_lengths(batch.lengths, length, self.device)
        for ratio in self.ratios:
            layout.entries(ratio)
        tokens_BS = batch.tokens.to(self.device, non_blocking=True)
        targets_BS = batch.targets.to(self.device, non_blocking=True)
        signals = {
            name: values.to(self.device, non_blocking=True)
            for name, values in batch.signals.items()
        }
        copied = self._module.Event()
        copied.record()
        counts = TokenCounts.of(host_layout, batch.targets)  # on the host: no wait for the device
        return Rows(tokens_BS, targets_BS, signals, layout, counts, copied)


class Microbatches(Sequence[Microbatch]):
    """Microbatches, each made on access: its RoPE tables are large where rows are long."""

    def __init__(
        self,
        model: V4Model,
        rows: list[Rows],
        counts: TokenCounts,
        mtp_loss_weight: float,
        attention: AttentionMode,
        experts: Sequence[SelectedExperts] | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective
        self.model, self.rows, self.attention = model, rows, attention
        self.counts, self.mtp_loss_weight = counts, mtp_loss_weight
        self.experts = experts or [{}] * len(rows)

    @property
    def tokens(self) -> int:
        """Positions of each microbatch, over all ranks that share its rows."""
        return self.rows[0].tokens_BS.numel()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self.rows[index]
        rows.wait_for_copies()
        return self.model.microbatch(
            rows.tokens_BS,
            rows.layout,
            rows.targets_BS,
            self.counts,
            self.mtp_loss_weight,
            self.experts[index],
            self.attention,
            rows.signals,
            self.objective,
        )
