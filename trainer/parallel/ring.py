"""Bytes that each rank sends in a ring collective. Imports no torch."""


def gather_bytes(ranks: int, part: float) -> float:
    """Of an all-gather to which each rank contributes `part` bytes."""
    return (ranks - 1) * part


def scatter_bytes(ranks: int, total: float) -> float:
    """Of a reduce-scatter of `total` bytes."""
    return (ranks - 1) / ranks * total


def sum_bytes(ranks: int, total: float) -> float:
    """Of an all-reduce of `total` bytes."""
    return 2 * (ranks - 1) / ranks * total
