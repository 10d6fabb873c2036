"""Compressed files, read to the end of their last frame or refused.

The usual readers disagree about the end: zstandard's takes a file that is cut off for a shorter
one and stops after the first of several frames, and lzma's and bz2's ignore whatever they cannot
read after the first stream. Here a file is frames (gzip calls them members, xz and bzip2 streams)
one after another, zstd's skippable ones included; zero bytes may follow each.
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

from data.errors import DataError
from data.storage import AnyPath

_READ_BYTES = 1 << 16
_MAX_WINDOW = 1 << 31  # bytes; zstd's own limit, which `--ultra --long=31` needs

# Suffixes of files, and what makes the decompressor of a frame.
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "gzip": ((".gz", ".gzip", ".bgz"), lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)),
    "bz2": ((".bz2",), bz2.BZ2Decompressor),
    "xz": ((".xz",), lzma.LZMADecompressor),
    "zstd": (
        (".zst", ".zstd"),
        lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj(),
    ),
}
_FORM_OF = {suffix: form for form, (suffixes, _) in _FORMATS.items() for suffix in suffixes}
SUFFIXES = tuple(_FORM_OF)
"""Suffixes of the names of compressed files."""

_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}


def compression_of(content: bytes) -> str | None:
    """The compression that made a file, by its first bytes; None for any other content."""
    return next((form for form, magic in _MAGIC.items() if magic.match(content)), None)


def form_of(file: AnyPath) -> str | None:
    """The compression that a file's name ends in."""
    return _FORM_OF.get(file.suffix)


def suffix_of(form: str) -> str:
    """The usual suffix of files of a compression."""
    return _FORMATS[form][0][0]


class DecompressedFile(io.RawIOBase):
    """The content of a compressed file, or of its frames from one on.

    Arguments:
        file: the open compressed file, closed with this one.
        form: gzip, bz2, xz or zstd.
        start: where the file stands, at the beginning of a frame. [compressed bytes]
        stop: where another frame begins. [compressed bytes]

    Attributes:
        end: where the content of that frame begins, counted from `start`; None before it has been
            reached.

    Reading raises DataError where the file ends inside a frame, a frame is damaged, or what
    follows a frame is no frame.
    """

    def __init__(self, file: BinaryIO, form: str, start: int = 0, stop: int | None = None) -> None:
        self._file, self._form = file, form
        self._start, self._stop = start, stop
        self._compressed, self._decompressed = start, 0  # bytes taken and made so far
        self.end: int | None = None
        self._new_frame = _FORMATS[form][1]
        self._frame: Any = None
        self._frames = 0
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with the next bytes; returns their number, 0 at the end."""
        while not len(self._output):
            block = self._input
            if not block:
                block = self._file.read(_READ_BYTES)
                self._compressed += len(block)
            if not block:
                if self._frame is not None or not self._frames:
                    raise self._error("is cut off: it ends inside a compressed frame")
                return 0
            self._decompress(block)
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self, block: bytes) -> None:
        """Decompresses `block` up to the end of a frame, the rest becoming the next input."""
        self._input = b""
        if self._frame is None:
            block = block.lstrip(b"\0") if self._frames else block
            if not block:
                return
            self._begin_frame(self._compressed - len(block))
        try:
            self._output = memoryview(self._frame.decompress(block))
        except (zlib.error, OSError, ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
            after = f" after byte {self._start:,}" if self._start else ""
            raise self._error(f"is damaged in frame {self._frames}{after}: {error}") from error
        self._decompressed += len(self._output)
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None

    def _begin_frame(self, place: int) -> None:
        """Begins the frame at a place in the compressed file."""
        if self._stop is not None and self.end is None and place >= self._stop:
            if place > self._stop:
                raise self._error(f"is damaged: no frame begins at byte {self._stop:,}")
            self.end = self._decompressed
        self._frame = self._new_frame()
        self._frames += 1

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        super().close()

    def _error(self, what: str) -> DataError:
        name = getattr(self._file, "path", None) or getattr(self._file, "name", "a stream")
        return DataError(f"{name} {what} ({self._form}); copy or download it again.")


def register_formats() -> None:
    """Makes fsspec, and thereby `datasets`, open compressed files by DecompressedFile."""
    from fsspec.compression import register_compression

    for form, (suffixes, _) in _FORMATS.items():
        extensions = [suffix.removeprefix(".") for suffix in suffixes]
        register_compression(form, _opener(form), extensions, force=True)


def _opener(form: str) -> Callable[..., io.BufferedReader]:
    def open_compressed(file: BinaryIO, mode: str = "rb", **_: Any) -> io.BufferedReader:
        if not mode.startswith("r"):
            raise ValueError(f"compressed files are opened for reading only, not with {mode!r}")
        return io.BufferedReader(DecompressedFile(file, form), _READ_BYTES)

    return open_compressed
