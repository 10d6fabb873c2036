"""What a work item reads of a file: all of it, or a part that is read without the others."""

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, PlainSerializer

from data.section import Section
from data.storage import AnyPath, as_path

_BYTES = "bytes:"  # begins the JSON text of a path that is not UTF-8, in hexadecimal digits


def _path_of(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_BYTES):
        value = os.fsdecode(bytes.fromhex(value.removeprefix(_BYTES)))
    return as_path(value)


def _text_of(path: AnyPath) -> str:
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{_BYTES}{os.fsencode(text).hex()}"
    return text


FilePath = Annotated[
    Any, BeforeValidator(_path_of), PlainSerializer(_text_of, return_type=str, when_used="json")
]
"""A local path or a URL, which JSON has as text."""


class Piece(Section):
    """A file of a source, or a part of one.

    Attributes:
        path: the file, a `pathlib.Path` or a `StoragePath`.
        size: bytes that are read, for the progress.
        start, stop: the part, from `start` until before `stop`: bytes of text, bytes of whole
            frames of a compressed file, or row groups of a table; no `stop` in a file that is not
            divided. Of lines, those whose preceding line end is inside are part of it, and the
            first of the file.
    """

    path: FilePath
    size: NonNegativeInt
    start: NonNegativeInt = 0
    stop: NonNegativeInt | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the file."""
        return self.stop is None
