"""One packing window: the documents of an interval of every source, packed into its rows.

Letters: D documents of the window, R rows, N sources.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.config import TransformsConfig
from data.errors import DataError
from data.rows.mixture import balanced_order
from data.rows.packing import PackedRows, concatenate, pack_into, pieces_of
from data.rows.permutation import hashes, key_of, uniforms
from data.rows.stream import DocumentSpans, SourceStream
from data.rows.transforms import FIM_EXTRA, NONE, PSM, SPM

Ints = NDArray[np.int64]
_FIM, _SPM, _SPLITS, _CUTS, _ROWS = 2, 3, 4, 5, 6  # purposes of a key; stream.py has 1


@dataclass(frozen=True)
class Window:
    """Documents, how they are transformed, and the rows of their pieces.

    Attributes:
        source, epoch, document [D]: which document it is.
        fim, splits, key [D]: its kind of FIM, number of splits, and the key of both.
        packed: the pieces in rows; `packed.document` indexes the window's documents.
        order [R]: row r of the window is row `order[r]` of `packed`.
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
    intervals: list[tuple[int, SourceStream, DocumentSpans]],
    counts: list[Ints | None],
    transforms: TransformsConfig | None,
    seq_len: int,
    rows: int,
    packing: str,
    seed: int,
    group: int,
    first_row: int,
) -> Window:
    """Packs an interval of every source into `rows` rows of `seq_len`.

    Arguments:
        intervals: index and stream of each source, and its documents.
        counts: splittable tokens of each document by source, where splits are used.
        seed: decides the order of the rows.
        group: the phase's `global_batch_size`; shares are balanced at its multiples.
        first_row: number of the window's first row in its phase.
    """
    columns = []
    for index, stream, spans in intervals:
        fim, splits, key = _choose_transforms(stream, spans, counts[index], transforms)
        source = np.full(len(fim), index)
        has_end = spans.end == spans.positions
        columns.append(
            (source, spans.epoch, spans.document, fim, splits, key, spans.first, spans.end, has_end)
        )
    source, epoch, document, fim, splits, key, first, end, has_end = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    extra = np.where(has_end, FIM_EXTRA * (fim != NONE) + splits, 0)
    _limit_transforms(seq_len * rows, first, end, extra, fim, splits)
    end = end + extra
    shuffle = np.argsort(hashes(np.arange(len(first)), key_of(seed, _ROWS)), kind="stable")
    owner, start, length = pieces_of(first[shuffle], end[shuffle], seq_len)
    pack = concatenate if packing == "concatenate" else pack_into
    packed = pack(shuffle[owner], start, length, seq_len, rows)
    tokens_RN = np.zeros((rows, len(counts)), dtype=np.int64)
    row_of = np.repeat(np.arange(rows), np.diff(packed.offsets))
    np.add.at(tokens_RN, (row_of, source[packed.document]), packed.length)
    order = balanced_order(tokens_RN, key_of(seed, _ROWS, 1), group, first_row)
    return Window(source, epoch, document, fim, splits, key, packed, order)


def _choose_transforms(
    stream: SourceStream,
    spans: DocumentSpans,
    counts: Ints | None,
    transforms: TransformsConfig | None,
) -> tuple[Ints, Ints, NDArray[np.uint64]]:
    """Kind of FIM, number of splits and key of each document, [D] each."""
    fim = np.zeros(len(spans.document), dtype=np.int64)
    splits = np.zeros(len(spans.document), dtype=np.int64)
    key = np.zeros(len(spans.document), dtype=np.uint64)
    if transforms is None:
        return fim, splits, key
    for epoch in np.unique(spans.epoch).tolist():
        in_epoch = spans.epoch == epoch
        numbers = spans.document[in_epoch]

        def draw(purpose: int, numbers: Ints = numbers, epoch: int = epoch) -> NDArray[np.float64]:
            return uniforms(numbers, key_of(stream.key, purpose, epoch))

        if transforms.fim_rate and stream.domain in transforms.fim_domains:
            kind = np.where(draw(_SPM) < transforms.fim_spm_rate, SPM, PSM)
            fim[in_epoch] = np.where(draw(_FIM) < transforms.fim_rate, kind, NONE)
        if counts is not None:
            drawn = np.floor(transforms.punctuation_split_rate * counts[numbers] + draw(_SPLITS))
            splits[in_epoch] = np.minimum(drawn, counts[numbers])
        key[in_epoch] = hashes(numbers, key_of(stream.key, _CUTS, epoch))
    return fim, splits, key


def _limit_transforms(
    capacity: int, first: Ints, end: Ints, extra: Ints, fim: Ints, splits: Ints
) -> None:
    """Undoes the transforms of a window's last documents until it fits into `capacity` positions.

    By chance, the drawn transforms can lengthen a window beyond its rows.
    """
    over = int((end - first + extra).sum()) - capacity
    if over <= 0:
        return
    # Both parts of a document cut by a window's end must agree, so only whole documents change.
    whole = np.flatnonzero((first == 0) & (extra > 0))[::-1]
    stop = int(np.searchsorted(np.cumsum(extra[whole]), over)) + 1
    if stop > len(whole):
        raise DataError(
            f"a packing window is {over} tokens too short; set data.packing_window larger or "
            "data.packing_fill smaller."
        )
    for column in (extra, fim, splits):
        column[whole[:stop]] = 0
