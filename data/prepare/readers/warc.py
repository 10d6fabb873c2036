"""The pages of web archives: WARC, whose text is extracted by trafilatura, and WET.

As datatrove's WarcReader with its Trafilatura extractor, whose process with a time limit does the
work. What differs: without a type of the payload, the page's own Content-Type decides, so that
libmagic is not needed; bytes that are no UTF-8 are decoded as the page says, or as trafilatura
guesses; and trafilatura's removal of repeated elements is off, since it remembers earlier pages:
the text of a page would depend on what its process has read before.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.pieces import Piece
from data.prepare.readers.record import Record
from data.prepare.readers.streams import PieceStream, is_empty, require_no_archive

_PAGE_SECONDS = 60.0
"""Limit of an extraction, far above what pages take: the text may not depend on the machine."""
_READ_BYTES = 1 << 16
_HTML = ("text/html", "application/xhtml+xml")
_Extract = Callable[[Any], str | None]


def read(source: SourceConfig, piece: Piece) -> Iterator[Record]:
    """The pages of an archive; one without text is a record without a visible character.

    Only responses that succeeded and are HTML, and in WET conversions to plain text, are pages.
    """
    require_no_archive(piece.path)
    if is_empty(piece):
        return
    archive, error = _warcio()
    with ExitStack() as stack:
        stream = stack.enter_context(PieceStream(piece)).stream
        extract = stack.enter_context(_extractor()) if source.format == "warc" else None
        try:
            for number, record in enumerate(archive(stream), 1):
                if (page := _page(record)) is not None:
                    place = f"record {number} of {piece.path}"
                    yield _text(source, place, number, page, extract)
                while record.raw_stream.read(_READ_BYTES):
                    pass
                if record.raw_stream.limit:  # bytes that should have followed
                    raise DataError(f"{piece.path} is cut off: it ends inside record {number}.")
        except error as problem:
            raise DataError(
                f"{piece.path} is no {source.format.upper()} archive, or damaged: "
                f"{' '.join(str(problem).split())[:200]}"
            ) from problem


def divide(source: SourceConfig, file: Piece, part_bytes: int) -> list[Piece] | str:
    """Why an archive is not divided."""
    return f"is a {source.format.upper()} archive, whose records are read in order"


def _warcio() -> tuple[Any, Any]:
    """The reader of archives, and its error."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise _not_installed("warcio") from error
    return ArchiveIterator, ArchiveLoadFailed


def _page(record: Any) -> tuple[bytes, str] | None:
    """(content, charset or "") of a record that is a page, otherwise None."""
    kind = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    charset = ""
    if record.rec_type == "response" and record.http_headers is not None:
        status = record.http_headers.get_statuscode()
        own_type = record.http_headers.get_header("Content-Type") or ""
        own_kind, _, parameters = own_type.partition(";")
        kind = kind or own_kind.strip().lower()
        charset = parameters.partition("charset=")[2].split(";")[0].strip(" \"'")
        is_page = kind in _HTML and status.startswith("2")
    else:
        is_page = record.rec_type == "conversion" and kind in (None, "text/plain", *_HTML)
    return (record.content_stream().read(), charset) if is_page else None


def _text(
    source: SourceConfig,
    place: str,
    number: int,
    page: tuple[bytes, str],
    extract: _Extract | None,
) -> Record:
    content, charset = page
    if extract is None:
        try:
            return Record(place, number, {source.field: content.decode()})
        except UnicodeDecodeError as error:
            return Record(place, number, None, f"is not UTF-8 at byte {error.start}")
    try:
        return Record(place, number, {source.field: extract(_decoded(content, charset)) or ""})
    except TimeoutError:
        problem = f"is a page whose text takes more than {_PAGE_SECONDS:.0f} s to extract"
    except (EOFError, OSError):
        problem = "is a page that ends the process which extracts its text"
    return Record(place, number, None, problem)


def _decoded(content: bytes, charset: str) -> str | bytes:
    """The text of a page, or its bytes where its encoding is to be guessed."""
    for encoding in ("utf-8", charset):
        try:
            return content.decode(encoding)
        except (UnicodeDecodeError, LookupError, ValueError):
            continue
    return content


@contextmanager
def _extractor() -> Iterator[_Extract]:
    """A function from a page to its text, which another process does, within the limit."""
    try:
        import trafilatura  # noqa: F401
        from datatrove.pipeline.extractors import Trafilatura
        from datatrove.pipeline.extractors.base import ExtractorSandbox
        from loguru import logger
    except ImportError as error:
        raise _not_installed("trafilatura") from error
    logger.disable("datatrove.pipeline.extractors.base")  # reports on its processes
    extract = Trafilatura(timeout=_PAGE_SECONDS, deduplicate=False).extract
    with ExtractorSandbox(timeout=_PAGE_SECONDS) as sandbox:
        yield lambda page: sandbox.process_document(page, extract)


def _not_installed(name: str) -> DataError:
    return DataError(
        f"`format: warc` and `format: wet` need {name}: pip install 'v4-pretrain[processing]'."
    )
