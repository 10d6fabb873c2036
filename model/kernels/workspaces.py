"""Memory that Triton's kernels take and the eager versions do not. Imports no torch and no triton.

T queries; H heads; K their width; k selected entries of a query.
"""

from __future__ import annotations

PROGRAMS = 528
"""With fewer blocks of keys than this, their queries are divided over several programs."""
PAIR_BYTES = 1 << 30
"""Size of the workspace of an ordered gradient of selected entries, unless one token needs more."""
SELECTED_TOKENS = 1 << 14
"""Tokens per launch of the selection, which bounds its scratch buffer."""
RANGE_PAIRS = 1 << 26
"""(query, entry) pairs per block of the indexer's objective, with 4 bytes of probability mass and
4 of a gradient each, where queries see all entries."""
LOSS_PAIR_BYTES = 1 << 28
"""Bytes of per-pair key gradients of such a block in memory at once, where entries are selected."""
LOSS_KEY_PROGRAMS = 264
"""Two per SM; with fewer blocks of keys than that, the queries of the objective's are divided."""
_MAX_KEYS = 64
"""Keys per program of the keys' gradient, at most."""


def attention_bytes(tokens: int, heads: int, dim: int, selected: int = 0) -> int:
    """Returns the bytes that attention's backward takes, at most.

    These are a copy of the queries and of the output's gradient, side by side; and then the partial
    sums of the keys' gradient, or the rows of pairs from which an ordered gradient is summed.

    Args:
        selected: k, 0 where queries see all entries.
    """
    rows = 2 * 2 * tokens * heads * dim
    parts = 4 * min(PROGRAMS * _MAX_KEYS, PROGRAMS * tokens) * dim
    of_token = 2 * selected * dim
    pairs = max(of_token, min(PAIR_BYTES, tokens * of_token))
    return rows + max(parts, pairs)


def objective_bytes(tokens: int, entries: int, dim: int, selected: int = 0) -> int:
    """Returns the maximum bytes of a block of the indexer's objective.

    These are probability mass and gradient of every pair, and then the keys' gradient: of
    every pair where entries are selected, else partial sums of several programs.

    Args:
        entries: C.
        dim: J, the width of the indexer's heads.
        selected: k, 0 where queries see all entries.
    """
    if selected:
        pairs = min(tokens * selected, max(LOSS_PAIR_BYTES // (4 * dim), selected))
        return pairs * 4 * (dim + 1)
    pairs = min(tokens * entries, max(RANGE_PAIRS, entries))
    return 8 * pairs + 4 * dim * (entries + LOSS_KEY_PROGRAMS * _MAX_KEYS)


def selection_bytes(tokens: int, selected: int) -> int:
    """Returns the bytes of candidates and their scores: twice k, rounded up, for each token."""
    best = 1 << (selected - 1).bit_length()
    return 8 * min(tokens, SELECTED_TOKENS) * 2 * best
