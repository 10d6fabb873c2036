"""What each rank keeps and computes under a layout: elements, FLOPs, buffers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from optim.config import MuonConfig
from optim.zero.plan import Layout, OwnedSlice, newton_schulz_flops

if TYPE_CHECKING:
    from rich.table import Table


PAGE_BYTES = 4096


def page_locked_bytes(size: int) -> int:
    """Returns the bytes of page-locked memory that a tensor of `size` bytes takes.

    torch rounds them up to a power of two, so that others can use them again, and the driver to a
    page.
    """
    return max(1 << (size - 1).bit_length(), PAGE_BYTES)


@dataclass
class Load:
    """What one rank keeps and computes.

    Attributes:
        muon, adamw: elements that it keeps fp32 masters and states of.
        gathered: those of `muon` in matrices that it gathers from the ranks that shard them.
        adamw_slices: contiguous slices of AdamW's elements, each with a step count.
        matrices, flops: matrices, and Newton–Schulz FLOPs on them in a step.
        buffer, used: elements of its partitions of all buffers, with and without the padding.
        locked_masters, locked_states: page-locked bytes of the host for a copy of each of them.
    """

    muon: int = 0
    adamw: int = 0
    gathered: int = 0
    adamw_slices: int = 0
    matrices: int = 0
    flops: int = 0
    buffer: int = 0
    used: int = 0
    locked_masters: int = 0
    locked_states: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of fp32 masters and states: 8 per element of Muon, 12 of AdamW."""
        return 8 * self.muon + 12 * self.adamw

    def __add__(self, other: Load) -> Load:
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def add_update(self, owned: OwnedSlice, config: MuonConfig) -> None:
        """Adds the state and the update of a slice."""
        copy = page_locked_bytes(4 * owned.state_size)
        self.locked_masters += copy
        if owned.matrices is None:
            self.adamw += owned.size
            self.adamw_slices += 1
            self.locked_states += 2 * copy + page_locked_bytes(4)
            return
        self.locked_states += copy
        count, rows, columns = owned.matrices
        self.muon += owned.state_size
        self.gathered += 0 if owned.assembly_rank is None else owned.state_size
        self.matrices += count
        self.flops += count * newton_schulz_flops(rows, columns, config)


def loads_of(layout: Layout, config: MuonConfig) -> list[list[Load]]:
    """The loads of a layout, by owner and then by assembly rank."""
    loads = [
        [Load(buffer=layout.partition_size) for _ in range(layout.num_shard_ranks)]
        for _ in range(layout.owners)
    ]
    for owned in layout.slices:
        for rank, load in enumerate(loads[owned.owner]):
            load.used += owned.size
            if owned.assembly_rank in (None, rank):
                load.add_update(owned, config)
    return loads


@dataclass(frozen=True)
class LoadSummary:
    """The loads of all ranks, summarised for display."""

    loads: Sequence[Load]

    @property
    def padding(self) -> float:
        """Padding of all buffers as a fraction of the elements that they hold."""
        used = sum(load.used for load in self.loads)
        return sum(load.buffer for load in self.loads) / used - 1.0 if used else 0.0

    @property
    def state_bytes_range(self) -> tuple[int, float, int]:
        """Minimum, mean and maximum of a rank's bytes of masters and states."""
        sizes = [load.state_bytes for load in self.loads]
        return min(sizes), sum(sizes) / len(sizes), max(sizes)

    @property
    def newton_schulz_imbalance(self) -> float:
        """The largest Newton–Schulz load of a rank over the mean."""
        flops = [load.flops for load in self.loads]
        return max(flops) * len(flops) / sum(flops) if sum(flops) else 1.0

    def sentence(self) -> str:
        """The summary in one sentence."""
        low, mean, high = (size / 2**20 for size in self.state_bytes_range)
        return (
            f"Optimizer state per rank: min {low:,.2f} MiB, mean {mean:,.2f}, max {high:,.2f}; "
            f"buffers padded by {self.padding:.1%}; the largest Newton–Schulz load is "
            f"{self.newton_schulz_imbalance:.3f} times the mean."
        )

    def table(self) -> Table:
        """Minimum, mean and maximum over the ranks of what they keep and compute."""
        from rich.table import Table  # only `v4 plan` needs it

        view = Table(title="optimizer load per rank", title_justify="left")
        for name in ("", "min", "mean", "max"):
            view.add_column(name, justify="right" if name else "left")
        for name, values in (
            ("matrices", [load.matrices for load in self.loads]),
            ("masters and states, MiB", [load.state_bytes / 2**20 for load in self.loads]),
            ("Newton–Schulz, GFLOP per step", [load.flops / 1e9 for load in self.loads]),
            ("buffer partitions, M elements", [load.buffer / 1e6 for load in self.loads]),
        ):
            mean = sum(values) / len(values)
            view.add_row(name, *(f"{value:,.1f}" for value in (min(values), mean, max(values))))
        return view
