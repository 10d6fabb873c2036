"""The corpus that needs no download."""

import json
from pathlib import Path

from data.prepare.demo_corpus import MAX_CODE_BYTES, MAX_PROSE_BYTES, build_demo_corpus


def test_demo_corpus(tmp_path: Path) -> None:
    code, prose = build_demo_corpus(tmp_path / "one")
    again = build_demo_corpus(tmp_path / "two")
    assert [code.read_bytes(), prose.read_bytes()] == [path.read_bytes() for path in again]
    stamp = code.stat().st_mtime_ns
    build_demo_corpus(tmp_path / "one")
    assert code.stat().st_mtime_ns == stamp

    texts: list[str] = []
    for path, limit in ((code, MAX_CODE_BYTES), (prose, MAX_PROSE_BYTES)):
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        size = sum(len(record["text"].encode()) for record in records)
        assert 500_000 < size <= limit
        texts += [record["text"] for record in records]
    assert len(set(texts)) == len(texts)
    assert any("def dumps(" in text for text in texts)
