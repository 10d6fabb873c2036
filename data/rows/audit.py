"""What the produced stream holds, counted token by token: FIM, splits and the sources' shares.

For a comparison with what is configured. Nothing here asks the loader what it meant to do, only
which document a piece comes from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.rows.loader import Loader

_SPAN = 1_000_000  # tokens over which shares are compared


@dataclass
class Counted:
    """One source: documents that began, those that are FIM; tokens that could be and are split."""

    tokens: int = 0
    documents: int = 0
    fim: int = 0
    splittable: int = 0
    split: int = 0


@dataclass
class Measured:
    """Over some steps of a loader.

    Attributes:
        steps, tokens: what was looked at.
        sources: by name. Splits are counted in documents that lie whole in a row.
        shares: wanted share of the tokens by source.
        worst: by source, the largest difference between its share of a run of whole steps of about
            a million tokens and the wanted one.
        span: tokens of such a run.
    """

    steps: int
    tokens: int = 0
    sources: dict[str, Counted] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    span: int = 0


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
    """All ranks' pieces of a step, row by row."""
    _, numbers = loader.schedule.rows_of(step)
    for place, batch in zip(range(len(numbers)), loader.whole(step), strict=True):
        at = loader.row_at(step, place)
        if at is None:
            continue
        window, row = at
        tokens, targets = batch.tokens[0].numpy(), batch.targets[0].numpy()
        position = 0
        for which, start, length in window.packed.row(row):
            here = slice(position, position + length)
            yield Piece(
                int(window.source[which]),
                int(window.epoch[which]),
                int(window.document[which]),
                start,
                tokens[here],
                targets[here],
            )
            position += length


def measure(loader: Loader, steps: int) -> Measured:
    """Count the first `steps` steps of a train split."""
    found = Measured(steps, sources={source.name: Counted() for source in loader.sources})
    by_step = np.zeros((steps, len(loader.sources)), dtype=np.int64)
    begin, table = int(loader.fim_ids[0]), loader.split_table
    for step in range(steps):
        for piece in pieces(loader, step):
            source = loader.sources[piece.source]
            counted = found.sources[source.name]
            by_step[step, piece.source] += len(piece.inputs)
            if piece.start == 0:
                counted.documents += 1
                counted.fim += bool(begin) and int(piece.targets[0]) == begin
            if len(table) and piece.start == 0 and piece.targets[-1] == loader.manifest.eos_id:
                raw = loader.document(source, piece.document)
                able = int((table[raw, 0] >= 0).sum())
                counted.splittable += able
                counted.split += able - int((table[piece.inputs, 0] >= 0).sum())
    for name, tokens in zip(found.sources, by_step.sum(axis=0).tolist(), strict=True):
        found.sources[name].tokens = tokens
    found.tokens = int(by_step.sum())
    found.shares = loader.wanted_shares(0)
    _spans(found, by_step)
    return found


def _spans(found: Measured, by_step: NDArray[np.int64]) -> None:
    """The worst share of a source over any run of steps with a million tokens."""
    steps = len(by_step)
    length = min(steps, max(1, -(-_SPAN * steps // max(1, found.tokens))))
    ends = np.concatenate([np.zeros((1, by_step.shape[1]), dtype=np.int64), by_step.cumsum(axis=0)])
    runs = ends[length:] - ends[:-length]
    totals = runs.sum(axis=1)
    found.span = int(totals.mean())
    for index, (name, wanted) in enumerate(found.shares.items()):
        found.worst[name] = float(np.abs(runs[:, index] / totals - wanted).max())
