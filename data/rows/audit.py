"""What the produced rows hold, counted token by token: FIM, splits and the sources' shares.

For a comparison with the configured values. Nothing is read from the loader's decisions except
which document a piece comes from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.rows.loader import Loader

_SPAN_TOKENS = 1_000_000  # over which shares are compared


@dataclass
class SourceAudit:
    """Counts of one source.

    Attributes:
        tokens: positions in the rows.
        documents: documents that begin in the rows.
        fim: those of them that are fill-in-the-middle documents.
        splittable, split: tokens that could be split, and those that are; counted in documents
            that lie whole in a row.
    """

    tokens: int = 0
    documents: int = 0
    fim: int = 0
    splittable: int = 0
    split: int = 0


@dataclass
class MixtureAudit:
    """Counts over the first steps of a loader.

    Attributes:
        steps, tokens: how much was counted.
        sources: by name.
        shares: configured share of the tokens by source.
        max_deviation: by source, the largest difference between its share of a run of whole steps
            of about a million tokens and the configured share.
        span_tokens: tokens of such a run.
    """

    steps: int
    tokens: int = 0
    sources: dict[str, SourceAudit] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    max_deviation: dict[str, float] = field(default_factory=dict)
    span_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """A piece of a document in a row: positions start … start+length-1, its inputs and targets."""

    source: int
    epoch: int
    document: int
    start: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def pieces(loader: Loader, step: int) -> Iterator[Piece]:
    """Yields all ranks' pieces of a step, row by row."""
    for place, batch in enumerate(loader.all_rows(step)):
        packed = loader.packed_row(step, place)
        if packed is None:
            continue
        window, row = packed
        tokens, targets = batch.tokens[0].numpy(), batch.targets[0].numpy()
        position = 0
        for index, start, length in window.packed.row(row):
            positions = slice(position, position + length)
            yield Piece(
                int(window.source[index]),
                int(window.epoch[index]),
                int(window.document[index]),
                start,
                tokens[positions],
                targets[positions],
            )
            position += length


def audit_mixture(loader: Loader, steps: int) -> MixtureAudit:
    """Counts the first `steps` steps of a train split."""
    audit = MixtureAudit(steps, sources={source.name: SourceAudit() for source in loader.sources})
    tokens_by_step = np.zeros((steps, len(loader.sources)), dtype=np.int64)
    begin, table = int(loader.fim_ids[0]), loader.split_table
    for step in range(steps):
        for piece in pieces(loader, step):
            source = loader.sources[piece.source]
            counts = audit.sources[source.name]
            tokens_by_step[step, piece.source] += len(piece.inputs)
            if piece.start == 0:
                counts.documents += 1
                counts.fim += bool(begin) and int(piece.targets[0]) == begin
            if len(table) and piece.start == 0 and piece.targets[-1] == loader.manifest.eos_id:
                raw = source.tokens_of(piece.document)
                splittable = int((table[raw, 0] >= 0).sum())
                counts.splittable += splittable
                counts.split += splittable - int((table[piece.inputs, 0] >= 0).sum())
    for name, tokens in zip(audit.sources, tokens_by_step.sum(axis=0).tolist(), strict=True):
        audit.sources[name].tokens = tokens
    audit.tokens = int(tokens_by_step.sum())
    audit.shares = loader.configured_shares(0)
    _set_deviations(audit, tokens_by_step)
    return audit


def _set_deviations(audit: MixtureAudit, tokens_by_step: NDArray[np.int64]) -> None:
    """The largest deviation of each source's share over any run of steps of a million tokens."""
    steps = len(tokens_by_step)
    length = min(steps, max(1, -(-_SPAN_TOKENS * steps // max(1, audit.tokens))))
    start = np.zeros((1, tokens_by_step.shape[1]), dtype=np.int64)
    ends = np.concatenate([start, tokens_by_step.cumsum(axis=0)])
    runs = ends[length:] - ends[:-length]
    totals = runs.sum(axis=1)
    audit.span_tokens = int(totals.mean())
    for index, (name, share) in enumerate(audit.shares.items()):
        audit.max_deviation[name] = float(np.abs(runs[:, index] / totals - share).max())
