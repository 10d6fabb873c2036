"""Bytes that each rank sends in a ring collective. Imports no torch."""


def all_gather_bytes(num_ranks: int, part: float) -> float:
    """Returns the bytes each rank sends in a ring all-gather of `part` bytes per rank."""
    return (num_ranks - 1) * part


def reduce_scatter_bytes(num_ranks: int, total: float) -> float:
    """Returns the bytes each rank sends in a ring reduce-scatter of `total` bytes."""
    return (num_ranks - 1) / num_ranks * total


def all_reduce_bytes(num_ranks: int, total: float) -> float:
    """Returns the bytes each rank sends in a ring all-reduce of `total` bytes."""
    return 2 * (num_ranks - 1) / num_ranks * total
