"""The table and the plot of a soak, over all of its pieces."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.soak.faults import FAULTS, KILLS
from benchmarks.soak.record import Line, fit

MIB = 2**20
COLORS = {"launcher": "#7a5bb5", "torchrun": "#2f9e76", "rank": "#3b82c4", "writer": "#e07b39"}


def fault_table(events: Sequence[Line]) -> Table:
    """Returns the faults, how often each came, and what it cost."""
    table = Table(title="faults", title_justify="left")
    table.add_column("fault")
    for name in ("times", "steps taken again", "at most", "seconds to the next step", "at most"):
        table.add_column(name, justify="right")
    faults = [event for event in events if event["event"] == "fault"]
    for name in FAULTS:
        some = [event for event in faults if event["fault"] == name]
        _add_row(table, name, some)
    table.add_section()
    _add_row(table, "all", faults)
    return table


def _add_row(table: Table, name: str, some: Sequence[Line]) -> None:
    seconds = [event["seconds"] for event in some if event["seconds"] is not None]
    repeated = [event["repeated"] for event in some]
    table.add_row(
        name,
        str(len(some)),
        f"{sum(repeated):,}",
        str(max(repeated, default=0)),
        f"{statistics.median(seconds):.0f}" if seconds else "",
        f"{max(seconds):.0f}" if seconds else "",
    )


def sentences(events: Sequence[Line], samples: Sequence[Line]) -> Iterator[str]:
    """Yields what was compared, and the lines fitted to memory and open files."""
    pieces = [event for event in events if event["event"] == "piece"]
    rounds = [event for event in events if event["event"] == "round"]
    faults = [event for event in events if event["event"] == "fault"]
    minutes = sum(event["minutes"] for event in pieces)
    kills = sum(event["fault"] in KILLS for event in faults)
    yield (
        f"{minutes:.0f} minutes in {len(pieces)} pieces, {len(faults)} faults, of which {kills} "
        f"killed ranks; {sum(event['complete'] for event in rounds)} complete runs"
    )
    compared = sum(event["compared"] for event in rounds)
    different = [text for event in rounds for text in event["differences"]]
    yield (
        f"{compared:,} records compared with the undisturbed run's, {len(different)} different, "
        f"{sum(event['tensors'] for event in rounds):,} tensors of last checkpoints, "
        f"{sum(event['different_tensors'] for event in rounds)} different; "
        f"{sum(event['lost'] for event in faults)} resumes from before the newest published one"
    )
    for event in events:
        if event["event"] == "problem":
            yield f"problem: {event['text']}"
    yield from different[:10]
    for role in COLORS:
        memory, files = fit(samples, role, "rss"), fit(samples, role, "files")
        if memory is not None and files is not None:
            yield (
                f"{role}: {memory.median / MIB:.0f} MiB resident, {memory.slope / MIB:+.2f} ± "
                f"{memory.error / MIB:.2f} MiB per hour; {files.median:.0f} open files, "
                f"{files.slope:+.2f} ± {files.error:.2f} per hour ({memory.samples} samples of "
                f"{memory.processes} processes, a constant for each)"
            )


def plot(events: Sequence[Line], samples: Sequence[Line], path: Path) -> None:
    """Draws memory and open files of all processes, and a line for each kill."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    if not samples:
        return
    hours = _hours_of_pieces(events, samples)
    series: dict[tuple[str, int], list[Line]] = {}
    for sample in samples:
        series.setdefault((sample["role"], sample["pid"]), []).append(sample)
    for axis, key, unit in zip(axes, ("rss", "files"), (MIB, 1), strict=True):
        for (role, _), points in series.items():
            times = [hours(point["time"]) for point in points]
            values = [point[key] / unit for point in points]
            axis.plot(times, values, color=COLORS[role], linewidth=0.8)
        for event in events:
            if event["event"] == "fault" and event["fault"] in KILLS:
                axis.axvline(hours(event["time"]), color="#c24b4b", linewidth=0.4, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("resident memory, MiB")
    axes[1].set_ylabel("open files")
    axes[1].set_xlabel("hours of soak; red: ranks were killed")
    handles = [axes[0].plot([], [], color=color, label=role)[0] for role, color in COLORS.items()]
    axes[0].legend(handles=handles, frameon=False, ncols=4, loc="upper left")
    figure.savefig(path)


class _Clock:
    """Hours of soak at a time, without the time between its pieces."""

    def __init__(self, starts: Sequence[float], ends: Sequence[float]) -> None:
        self.starts, self.ends = starts, ends

    def __call__(self, moment: float) -> float:
        total = 0.0
        for start, end in zip(self.starts, self.ends, strict=True):
            total += min(max(moment - start, 0.0), end - start)
        return total / 3600


def _hours_of_pieces(events: Sequence[Line], samples: Sequence[Line]) -> _Clock:
    pieces = [event for event in events if event["event"] == "piece"]
    starts = [piece["time"] - 60 * piece["minutes"] for piece in pieces]
    ends = [piece["time"] for piece in pieces]
    if not pieces or samples[-1]["time"] > ends[-1]:
        starts.append(max([samples[0]["time"], *ends]))
        ends.append(samples[-1]["time"])
    return _Clock(starts, ends)
