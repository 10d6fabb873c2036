"""One window: the documents of an interval of every source, packed into its rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.config import TransformsConfig
from data.errors import DataError
from data.rows.mixture import balanced_order
from data.rows.packing import PackedRows, concatenate, pack_into, pieces_of
from data.rows.permutation import hashes, key_of, uniforms
from data.rows.stream import Documents, SourceStream
from data.rows.transforms import FIM_EXTRA, NONE, PSM, SPM

Ints = NDArray[np.int64]
_FIM, _SPM, _SPLITS, _CUTS, _ROWS = 2, 3, 4, 5, 6  # what a key is for; 1 is the order of documents


@dataclass(frozen=True)
class Window:
    """Documents with what is done to them, [D] each, and the rows of their pieces.

    `packed.document` counts through the window's documents; row r of the window is row `order[r]`
    of `packed`.
    """

    source: Ints
    epoch: Ints
    document: Ints
    fim: Ints
    splits: Ints
    key: NDArray[np.uint64]
    packed: PackedRows
    order: Ints


def build_window(
    parts: list[tuple[int, SourceStream, Documents]],
    counts: list[Ints | None],
    transforms: TransformsConfig | None,
    seq_len: int,
    rows: int,
    packing: str,
    seed: int,
    group: int,
    first_row: int,
) -> Window:
    """Pack the given documents of every source into `rows` rows of `seq_len`.

    Steps have `group` rows; `first_row` is the number of the window's first row in its phase.
    """
    columns = []
    for index, stream, found in parts:
        fim, splits, key = _decide(stream, found, counts[index], transforms)
        columns.append(
            (
                np.full(len(fim), index),
                found.epoch,
                found.document,
                fim,
                splits,
                key,
                *_extent(stream, found),
            )
        )
    source, epoch, document, fim, splits, key, first, last, ends = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    extra = np.where(ends, FIM_EXTRA * (fim != NONE) + splits, 0)
    _keep_within(seq_len * rows, first, last, extra, fim, splits)
    last = last + extra
    shuffle = np.argsort(hashes(np.arange(len(first)), key_of(seed, _ROWS)), kind="stable")
    which, start, length = pieces_of(first[shuffle], last[shuffle], seq_len)
    place = concatenate if packing == "concatenate" else pack_into
    packed = place(shuffle[which], start, length, seq_len, rows)
    tokens_RS = np.zeros((rows, len(counts)), dtype=np.int64)
    row_of = np.repeat(np.arange(rows), np.diff(packed.offsets))
    np.add.at(tokens_RS, (row_of, source[packed.document]), packed.length)
    order = balanced_order(tokens_RS, key_of(seed, _ROWS, 1), group, first_row)
    return Window(source, epoch, document, fim, splits, key, packed, order)


def _extent(stream: SourceStream, found: Documents) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """First and last position, and whether the document's end is inside."""
    ends = found.last == stream.lengths[found.document] - 1
    return found.first, found.last, ends


def _decide(
    stream: SourceStream, found: Documents, counts: Ints | None, transforms: TransformsConfig | None
) -> tuple[Ints, Ints, NDArray[np.uint64]]:
    """FIM kind, number of splits and key of each document."""
    fim = np.zeros(len(found.document), dtype=np.int64)
    splits = np.zeros(len(found.document), dtype=np.int64)
    key = np.zeros(len(found.document), dtype=np.uint64)
    if transforms is None:
        return fim, splits, key
    for epoch in np.unique(found.epoch).tolist():
        here = found.epoch == epoch
        numbers = found.document[here]

        def draw(purpose: int, numbers: Ints = numbers, epoch: int = epoch) -> NDArray[np.float64]:
            return uniforms(numbers, key_of(stream.key, purpose, epoch))

        if transforms.fim_rate and stream.domain in transforms.fim_domains:
            kind = np.where(draw(_SPM) < transforms.fim_spm, SPM, PSM)
            fim[here] = np.where(draw(_FIM) < transforms.fim_rate, kind, NONE)
        if counts is not None:
            splits[here] = np.floor(transforms.split_share * counts[numbers] + draw(_SPLITS))
            splits[here] = np.minimum(splits[here], counts[numbers])
        key[here] = hashes(numbers, key_of(stream.key, _CUTS, epoch))
    return fim, splits, key


def _keep_within(room: int, first: Ints, last: Ints, extra: Ints, fim: Ints, splits: Ints) -> None:
    """Where chance lengthened a window's documents beyond its rows, leave the last as they are."""
    over = int((last - first + extra).sum()) - room
    if over <= 0:
        return
    # Both parts of a document cut by a window's edge must agree, so only whole documents change.
    whole = np.flatnonzero((first == 0) & (extra > 0))[::-1]
    stop = int(np.searchsorted(np.cumsum(extra[whole]), over)) + 1
    if stop > len(whole):
        raise DataError(
            f"a packing window lacks room for {over} tokens; data.packing_window should be larger, "
            "or data.packing_fill smaller."
        )
    for column in (extra, fim, splits):
        column[whole[:stop]] = 0
