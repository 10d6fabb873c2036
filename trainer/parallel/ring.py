"""Bytes that a rank sends in a collective that runs as a ring. Imports no torch."""


def gather_bytes(ranks: int, part: float) -> float:
    """Of a ring in which each rank gives `part` bytes to all others."""
    return (ranks - 1) * part


def scatter_bytes(ranks: int, total: float) -> float:
    """Of a ring that sums `total` bytes and leaves each rank its share."""
    return (ranks - 1) / ranks * total


def sum_bytes(ranks: int, total: float) -> float:
    """Of a ring that sums `total` bytes (or takes maxima) for all ranks."""
    return 2 * (ranks - 1) / ranks * total
