"""Where frames of compressed files begin, so that what follows can be read on its own.

Only headers are read. zstd files are walked from frame to frame and block to block (RFC 8878), or
have a table of their frames at the end, as the seekable format does; in object storage, where
every step is a request, only with the table. bgzip's blocks, of at most 64 KiB, have their size in
an extra field of gzip's header (SAM specification, section 4.1), so that one is found near any
place. Whoever reads up to a frame finds out whether one begins there.
"""

import os
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import BinaryIO

import zstandard

_FRAME = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_HEADER_BYTES = 18  # of the longest header of a zstd frame, and of a bgzip block
_RLE_BLOCK = 1
_TABLE = 0x8F92EAB1  # ends a table of frames
_CHECKSUMS = 0x80
_BLOCK = re.compile(rb"\x1f\x8b\x08\x04.{6}\x06\x00BC\x02\x00(..)", re.DOTALL)
_BLOCK_BYTES = 1 << 16


def frame_starts(
    stream: BinaryIO, form: str, places: Sequence[int], size: int, is_local: bool = True
) -> list[int]:
    """The first frame at or after each of some places, without repetitions, in bytes of the file.

    Arguments:
        form: the compression; of bz2 and xz nothing is found.
        places: bytes from the file's beginning, in increasing order.
        size: of the file. [bytes]
        is_local: whether the stream may be read at many places.
    """
    if form == "gzip":
        blocks = (_block_near(stream, place, size) for place in places)
        return sorted({block for block in blocks if block is not None})
    if form != "zstd":
        return []
    starts: list[int] = []
    remaining = list(places)
    frames: Iterator[int] = iter(_table(stream, size))
    if is_local:
        frames = _frames(stream, size)
    for frame in frames:
        if remaining and frame >= remaining[0]:
            starts.append(frame)
            remaining = [place for place in remaining if place > frame]
    return starts


def _frames(stream: BinaryIO, size: int) -> Iterator[int]:
    """The places of zstd frames with content, up to what cannot be read."""
    place = 0
    while place < size:
        header = _read(stream, place, _HEADER_BYTES)
        if header.startswith(_FRAME):
            yield place
            end = _end_of_frame(stream, place, header)
            if end is None:
                return
            place = end
        elif _SKIPPABLE.match(header) and len(header) >= 8:
            place += 8 + int(struct.unpack_from("<I", header, 4)[0])
        elif header and not header.strip(b"\0"):
            place += len(header)
        elif header.startswith(b"\0"):
            place += len(header) - len(header.lstrip(b"\0"))
        else:
            return


def _end_of_frame(stream: BinaryIO, place: int, header: bytes) -> int | None:
    """Where the zstd frame at `place` ends; None where its header cannot be read."""
    try:
        frame = zstandard.get_frame_parameters(header)
        place += zstandard.frame_header_size(header)
    except zstandard.ZstdError:
        return None
    while len(block := _read(stream, place, 3)) == 3:
        fields = int.from_bytes(block, "little")
        is_last, kind, size = fields & 1, fields >> 1 & 3, fields >> 3
        place += 3 + (1 if kind == _RLE_BLOCK else size)
        if is_last:
            return place + 4 * frame.has_checksum
    return None


def _table(stream: BinaryIO, size: int) -> list[int]:
    """The places of frames that a zstd file's table has; none without a table."""
    footer = _read(stream, max(0, size - 9), 9)
    if len(footer) < 9:
        return []
    count, descriptor, magic = struct.unpack("<IBI", footer)
    if magic != _TABLE:
        return []
    entry = 12 if descriptor & _CHECKSUMS else 8
    first = size - 9 - count * entry
    sizes = [
        struct.unpack_from("<I", table, 0)[0]
        for table in _entries(_read(stream, max(0, first), count * entry), entry)
    ]
    *starts, end = accumulate(sizes, initial=0)
    return starts if end + 8 == first else []


def _entries(table: bytes, size: int) -> Iterator[bytes]:
    return (table[at : at + size] for at in range(0, len(table), size))


def _block_near(stream: BinaryIO, place: int, size: int) -> int | None:
    """The first bgzip block at or after a place, which another one or the file's end follows."""
    window = _read(stream, place, 2 * _BLOCK_BYTES + _HEADER_BYTES)
    for match in _BLOCK.finditer(window[: _BLOCK_BYTES + _HEADER_BYTES]):
        following = match.start() + int.from_bytes(match[1], "little") + 1
        if place + following == size or _BLOCK.match(window, following):
            return place + match.start()
    return None


def _read(stream: BinaryIO, place: int, size: int) -> bytes:
    stream.seek(place, os.SEEK_SET)
    return stream.read(size)
