"""Web archives: which records are pages, their text, limits and damage."""

import gzip
import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.corpus import BadRecord, Corpus
from data.prepare.pieces import Piece
from data.prepare.readers import divide

warcio = pytest.importorskip("warcio.warcwriter")
headers = pytest.importorskip("warcio.statusandheaders")
PARAGRAPH = "The compressor pools the keys of several tokens into one entry, number {}. " * 4


def page(number: int, head: str = "") -> str:
    return (
        f"<html><head><title>t</title>{head}</head><body><nav><a href=/>Home</a></nav><article>"
        f"<h1>Title {number}</h1><p>{PARAGRAPH.format(*[number] * 4)}</p></article>"
        "<script>var x = 1;</script></body></html>"
    )


def write(
    file: Path, records: list[tuple[str, str, bytes, dict[str, str]]], compressed: bool = True
) -> None:
    """Records (kind, HTTP status or "", content, HTTP or WARC headers)."""
    with file.open("wb") as stream:
        writer = warcio.WARCWriter(stream, gzip=compressed)
        for number, (kind, status, content, fields) in enumerate(records):
            http = None
            if status:
                http = headers.StatusAndHeaders(status, list(fields.items()), protocol="HTTP/1.1")
            record = writer.create_warc_record(
                f"http://site/{number}",
                kind,
                payload=io.BytesIO(content),
                http_headers=http,
                warc_content_type="" if status else "text/plain",
                warc_headers_dict={} if status else fields,
            )
            writer.write_record(record)


def corpus(file: Path, form: str = "warc") -> Corpus:
    return Corpus(SourceConfig.model_validate({"name": "s", "paths": [str(file)], "format": form}))


def html(content: str, charset: str = "", encoding: str = "utf-8", status: str = "200 OK") -> Any:
    kind = "text/html" + (f"; charset={charset}" if charset else "")
    return "response", status, content.encode(encoding), {"Content-Type": kind}


@pytest.mark.parametrize("compressed", [True, False])
def test_text_of_pages(tmp_path: Path, compressed: bool) -> None:
    records = [
        ("warcinfo", "", b"software: x", {}),
        ("request", "", b"GET /", {}),
        html(page(1)),
        html(page(2), status="404 Not Found"),
        ("response", "200 OK", b"\x89PNG", {"Content-Type": "image/png"}),
        html("<html><body></body></html>"),
        html(page(3).replace("several", "quelqu’un à côté"), "windows-1252", "cp1252"),
        html(page(4).replace("several", "несколько слов подряд"), "", "cp1251"),
    ]
    file = tmp_path / ("a.warc.gz" if compressed else "a.warc")
    write(file, records, compressed)
    source = corpus(file)
    texts = [document.text for document in source]
    assert [text.split("number ")[1][0] for text in texts] == ["1", "3", "4"]
    assert source.empty == 1  # the page without text
    assert all("Home" not in text and "var x" not in text for text in texts)
    assert "quelqu’un à côté" in texts[1] and "несколько слов подряд" in texts[2]
    assert [document.text for document in source] == texts


def test_a_page_has_the_same_text_after_others(tmp_path: Path) -> None:
    write(tmp_path / "a.warc", [html(page(1))] * 4, False)
    assert len({document.text for document in corpus(tmp_path / "a.warc")}) == 1


def test_wet_is_taken_as_it_is(tmp_path: Path) -> None:
    text = " one\r\ntwo\u2028 \n"
    records = [
        ("warcinfo", "", b"x", {}),
        ("conversion", "", text.encode(), {"WARC-Identified-Payload-Type": "text/html"}),
        ("conversion", "", b"", {}),
        ("conversion", "", b"caf\xe9", {}),
        ("metadata", "", b"fetchTimeMs: 1", {}),
    ]
    write(tmp_path / "a.warc.wet.gz", records)
    source, bad = corpus(tmp_path / "a.warc.wet.gz", "wet"), []
    assert [document.text for document in source.documents(bad)] == [text]
    assert source.empty == 1
    assert bad == [BadRecord(f"record 4 of {tmp_path}/a.warc.wet.gz", 4, "is not UTF-8 at byte 3")]


def test_pages_that_take_too_long_or_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(text: str, **options: Any) -> str:
        if "number 1" in text:
            time.sleep(60)
        if "number 2" in text:
            sys.exit(1)
        return "text"

    monkeypatch.setattr("trafilatura.extract", extract)
    monkeypatch.setattr("data.prepare.readers.warc._PAGE_SECONDS", 1.0)
    write(tmp_path / "a.warc", [html(page(1)), html(page(2)), html(page(3))], False)
    bad: list[BadRecord] = []
    assert [d.text for d in corpus(tmp_path / "a.warc").documents(bad)] == ["text"]
    assert [record.reason for record in bad] == [
        "is a page whose text takes more than 1 s to extract",
        "is a page that ends the process which extracts its text",
    ]


def test_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.warc"
    write(file, [html(page(1)), html(page(2))], False)
    content = file.read_bytes()
    file.write_bytes(content[:-300])
    with pytest.raises(DataError, match=r"a.warc is cut off: it ends inside record 2\."):
        list(corpus(file))
    packed = tmp_path / "b.warc.gz"
    packed.write_bytes(gzip.compress(content)[:-300])
    with pytest.raises(DataError, match=r"b.warc.gz is cut off"):
        list(corpus(packed))
    (tmp_path / "c.warc").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"c.warc is no WARC archive, or damaged"):
        list(corpus(tmp_path / "c.warc"))
    source = corpus(file).source
    reason = "is a WARC archive, whose records are read in order"
    assert divide(source, Piece(path=file, size=1 << 30), 1) == reason


def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.warc", [html(page(1))], False)
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(DataError, match=r"need trafilatura: pip install 'v4-pretrain\[process"):
        list(corpus(tmp_path / "a.warc"))
    monkeypatch.setitem(sys.modules, "warcio.archiveiterator", None)
    with pytest.raises(DataError, match="need warcio: pip"):
        list(corpus(tmp_path / "a.warc", "wet"))
