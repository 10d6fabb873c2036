"""Formats numbers for tables and messages."""

from collections.abc import Iterable

GIB = 2**30


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
