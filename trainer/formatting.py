"""Formats numbers and ranks for tables and messages."""

from collections.abc import Iterable, Sequence
from typing import Protocol

GIB = 2**30
SHOWN_HOSTS = 4
SHOWN_RANKS = 8


class OnHost(Protocol):
    """One rank, and the name of its host."""

    @property
    def rank(self) -> int: ...
    @property
    def host(self) -> str: ...


def short(value: float) -> str:
    """Returns a number with a unit letter: 10.3M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Returns seconds in a unit that gives few digits: 2.5 h."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def gib(size: int) -> str:
    """Returns bytes as GiB, or as MiB below 1 GiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def span(numbers: Iterable[int]) -> str:
    """Formats consecutive numbers by the first and the last: `3-7`; nothing for none."""
    numbers = list(numbers)
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]}-{numbers[-1]}"


def where(ranks: Iterable[OnHost]) -> str:
    """Returns `ranks 2, 3 on host-b and rank 4 on host-c`, shortened after a few hosts."""
    hosts: dict[str, list[int]] = {}
    for one in ranks:
        hosts.setdefault(one.host, []).append(one.rank)
    named = [
        f"{rank_list(numbers)} on {host}" for host, numbers in list(hosts.items())[:SHOWN_HOSTS]
    ]
    if (more := len(hosts) - len(named)) > 0:
        named.append(f"those on {more} more host{'s' if more > 1 else ''}")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def rank_list(ranks: Sequence[int]) -> str:
    """Returns `rank 2` or `ranks 2, 3`, shortened after a few."""
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS])) + ", …" * (len(ranks) > SHOWN_RANKS)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
