"""Sources in object storage, on the hub and on web servers."""

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import data.prepare.work_item
from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.prepare.corpus import Corpus, require_distinct
from data.prepare.find_files import stored_now
from data.prepare.run import prepare
from data.prepare.work_item import work_items
from data.storage import RangeReader, StoragePath
from tests.data.prepare.test_corpus import corpus, jsonl, texts_of
from tests.data.prepare.test_pieces import bgzip
from tests.hub_server import start_hub
from tests.s3 import S3Server

TEXTS = [f"Document {i} " + "of many " * (i % 30) for i in range(3000)]


@pytest.fixture(params=["s3", "memory"])
def bucket(request: pytest.FixtureRequest) -> StoragePath:
    """A folder in each of two storages, whose drivers are an asynchronous one and another."""
    if request.param == "memory":
        folder = StoragePath(f"memory://{request.node.name.split('[')[0]}")
        folder.remove_tree()
        return folder
    s3: S3Server = request.getfixturevalue("s3")
    s3.set_faults()
    name = re.sub("[^a-z]+", "-", request.node.name.split("[")[0])[-50:].strip("-")
    return StoragePath(s3.make_bucket(name)) / "in"


def test_names_folders_and_wildcards(bucket: StoragePath) -> None:
    for name in ("a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl", "_SUCCESS", "sub/.hidden.jsonl"):
        (bucket / name).write(jsonl([name[-7]]))
    for pattern, texts in {
        "": "abc",
        "/a.jsonl": "a",
        "/*": "abc",
        "/**": "abc",
        "/sub/": "bc",
        "/*/*.jsonl": "b",
        "/**/*.jsonl": "abc",
        "/[ab].jsonl": "a",
    }.items():
        assert "".join(texts_of(corpus(paths=[f"{bucket}{pattern}"]))) == texts, pattern
    both = corpus(paths=[str(bucket), f"{bucket}/a.jsonl"], include=["**/[ac].jsonl"])
    assert texts_of(both) == ["a", "c"]
    for pattern in ("/nothing", "/nothing/*.jsonl", "/_SUCC*"):
        with pytest.raises(DataError, match=r"source 's': nothing to read at .*(no such|hidde)"):
            corpus(paths=[f"{bucket}{pattern}"])
    one, two = (corpus(name=n, paths=[f"{bucket}{p}"]) for n, p in (("one", ""), ("two", "/a*")))
    with pytest.raises(DataError, match=r"'one' and 'two' both read \w+://.*/a\.jsonl"):
        require_distinct([one, two])


def test_remote_files_are_read_and_divided(
    bucket: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = jsonl(TEXTS)
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    files = {
        "a.jsonl": lines,
        "b.jsonl.gz": bgzip(lines, 4000),
        "c.parquet": (tmp_path / "a.parquet").read_bytes(),
        "d.jsonl.zst": zstandard.compress(lines),
    }
    for name, content in files.items():
        (bucket / name).write(content)
        form = "parquet" if name.endswith("parquet") else "json"
        monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", len(content) // 4)
        source = SourceConfig(name="s", paths=(f"{bucket}/{name}",), format=form)
        items = work_items(Corpus(source))
        assert (len(items) > 2) == (name != "d.jsonl.zst"), name
        texts = [d.text for item in items for d in Corpus(source, item.pieces).documents()]
        assert texts == texts_of(Corpus(source)) == TEXTS, name


def test_failures_of_the_storage_cost_nothing_but_time(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.set_faults()
    folder = StoragePath(s3.make_bucket("failures"))
    (folder / "a.jsonl").write(jsonl(TEXTS))
    monkeypatch.setattr("data.storage.retries.DELAYS", (0.01,) * 3)
    monkeypatch.setattr("data.storage.reader._FIRST_BYTES", 4096)
    source = corpus(paths=[str(folder)])
    s3.set_faults(
        {"method": "GET", "path": "a.jsonl", "status": 503, "times": 2},
        {"method": "GET", "path": "a.jsonl", "cut": 0, "skip": 2},
        {"method": "GET", "path": "a.jsonl", "torn": 100, "skip": 3},
    )
    assert texts_of(source) == TEXTS
    assert s3.applied() == [2, 1, 1]
    assert capsys.readouterr().err.count("next attempt in") == 2  # the driver repeats the others
    s3.set_faults({"method": "GET", "path": "a.jsonl", "status": 503, "times": 9})
    with pytest.raises(DataError, match=r"^cannot read s3://failures/a\.jsonl: .*\.$"):
        texts_of(source)
    s3.set_faults({"path": "failures", "status": 403, "times": 9})
    with pytest.raises(DataError, match=r"^source 's': cannot read s3://f.*: access was refused"):
        corpus(paths=[str(folder)])
    s3.set_faults()
    with pytest.raises(DataError, match=r"cannot read s3://not-there.*: the bucket does not exist"):
        corpus(paths=["s3://not-there/*.jsonl"])


def test_shards_of_remote_files(
    config: DataConfig, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are current until the storage has another version; one that changes meanwhile fails."""
    s3.set_faults()
    folder = StoragePath(s3.make_bucket("versions"))
    for name in ("a.jsonl", "copy.jsonl"):
        (folder / name).write(jsonl(TEXTS[:50]))
    source = {"name": "s", "paths": [str(folder)], "split": "train"}
    fields = {"sources": [source], "shards": str(tmp_path / "shards")}
    remote = DataConfig.model_validate(config.model_dump() | fields)
    manifest = prepare(remote, progress=False)
    assert sum(shard.documents for shard in manifest.shards) == 100
    assert "copy.jsonl seems to be a copy of s3://versions/a.jsonl" in capsys.readouterr().err
    digests = set()
    for name in ("a.jsonl", "copy.jsonl"):  # of the same content, at another place
        update = {
            "sources": [source | {"paths": [f"{folder}/{name}"]}],
            "shards": f"{tmp_path}/{name}",
        }
        digests.add(prepare(DataConfig.model_validate(config.model_dump() | update), False).digest)
    assert len(digests) == 2
    before = len(s3.requests())
    assert prepare(remote, progress=False) == manifest
    assert len(s3.requests()) < before + 6, "nothing is read to find out that it is current"
    (folder / "a.jsonl").write(jsonl(TEXTS[1:51]))
    with pytest.raises(DataError, match="--overwrite"):
        prepare(remote, progress=False)
    texts = Corpus.documents

    def change(*arguments: object) -> Iterator[object]:
        yield from texts(*arguments)  # type: ignore[arg-type]
        (folder / "copy.jsonl").write(jsonl(TEXTS[2:52]))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Corpus, "documents", change)
        with pytest.raises(DataError, match=r"s3://versions/copy\.jsonl changed while it was read"):
            prepare(remote, progress=False, overwrite=True)
    assert prepare(remote, progress=False, overwrite=True).digest != manifest.digest


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, with ranges of bytes where the path begins with /ranges/."""

    faults: list[int] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path.removeprefix("/ranges")))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.faults:
            self.send_error(self.faults.pop())
            return
        if not self.path.startswith("/ranges/") or not path.is_file() or wanted is None:
            super().do_GET()
            return
        content = path.read_bytes()
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        self.send_response(206 if start < len(content) else 416)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(max(0, stop - start)))
        self.send_header("Etag", f'"{hash(content)}"')
        self.end_headers()
        self.wfile.write(content[start:stop])


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server of the folder `tmp_path`."""
    handler = partial(Handler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_web_servers(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.storage.retries.DELAYS", (0.01,) * 3)
    content = jsonl(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    url = f"{web}/ranges/a.jsonl"
    source = corpus(paths=[url, f"{web}/ranges/empty.jsonl"])
    assert [file.size for file in source.files] == [len(content), 0]
    assert texts_of(source) == TEXTS and source.empty_files == 1
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", len(content) // 3)
    items = work_items(corpus(paths=[url]))
    pieces = [piece for item in items for piece in item.pieces]
    assert len(pieces) == 3
    assert texts_of(Corpus(source.source, pieces)) == TEXTS
    Handler.faults[:] = [503, 503]
    assert texts_of(corpus(paths=[url])) == TEXTS
    assert capsys.readouterr().err.count("next attempt in") == 2
    for fault, message in ((403, "access was refused"), (404, "does not exist")):
        Handler.faults[:] = [fault]
        with pytest.raises(DataError, match=rf"cannot read {url}: {message}") as caught:
            corpus(paths=[url])
        assert "\n" not in str(caught.value)
    assert not capsys.readouterr().err, "neither is repeated"


def test_a_web_server_that_sends_whole_files_only(web: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match=r"a\.jsonl: its server does not read parts of files; down"):
        corpus(paths=[f"{web}/a.jsonl"])


def test_files_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: jsonl([name]) for name in ("a.jsonl", "sub/b.jsonl", "README.md")}
    files["sub/c.jsonl"] = content = jsonl(TEXTS)
    with start_hub(files) as endpoint:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        hub = "hf://datasets/me/data"
        for path, texts in {
            "": ["a.jsonl", "sub/b.jsonl", *TEXTS],
            "/sub/b*": ["sub/b.jsonl"],
            "@main/**/c.jsonl": TEXTS,
            "@main/a.jsonl": ["a.jsonl"],
        }.items():
            assert texts_of(corpus(paths=[f"{hub}{path}"])) == texts, path
        source = corpus(paths=[f"{hub}/*/c.jsonl"])
        monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", len(content) // 3)
        pieces = [piece for item in work_items(source) for piece in item.pieces]
        assert len(pieces) == 3 and texts_of(Corpus(source.source, pieces)) == TEXTS
        (file,) = source.files
        assert stored_now(file.path) == file
        files["sub/c.jsonl"] = content.replace(b"many", b"MANY")
        assert stored_now(file.path).size == file.size and stored_now(file.path) != file
        files["sub/new.jsonl"] = b""
        assert len(corpus(paths=[f"{hub}/sub/*"]).files) == 3, "the driver's list is a new one"
        for path in ("hf://datasets/me/other/a.jsonl", f"{hub}/nothing/*"):
            with pytest.raises(DataError, match="nothing to read at hf://datasets/me"):
                corpus(paths=[path])


def test_an_object_that_shrinks_is_refused(bucket: StoragePath) -> None:
    file = bucket / "a.txt"
    file.write(b"x" * 2000)
    reader = RangeReader(file)
    assert reader.read(7) == b"x" * 7
    assert reader.seek(-5, 2) == 1995 and reader.read() == b"x" * 5 and reader.read(3) == b""
    shrunk = RangeReader(file)
    file.write(b"x" * 1000)
    with pytest.raises(OSError, match="it changed while it was read"):
        shrunk.read(1500)


@pytest.mark.parametrize("url", ["s3://me:secret@b/x", "https://host/x.jsonl?token=secret"])
def test_credentials_in_paths_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        SourceConfig(name="s", paths=(url,))
    assert "secret" not in json.dumps([error["msg"] for error in caught.value.errors()])  # type: ignore[attr-defined]
