"""Parts of files: what travels to other hosts."""

import os
from pathlib import Path

from data.config import SourceConfig
from data.prepare.pieces import Piece
from data.prepare.work_item import WorkItem
from data.storage import as_path


def test_a_work_item_travels_as_json() -> None:
    paths = [as_path("/data/a.jsonl"), as_path("s3://bucket/é.parquet")]
    paths.append(Path(os.fsdecode(b"/data/caf\xe9.txt")))  # not UTF-8, as file systems allow
    pieces = tuple(Piece(path=path, size=9, start=3, stop=5) for path in paths)
    source = SourceConfig(name="s", paths=("/data",))
    item = WorkItem(source=source, number=7, pieces=pieces)
    copy = WorkItem.model_validate_json(item.model_dump_json())
    assert copy == item and hash(copy) == hash(item)
    assert [piece.path for piece in copy.pieces] == paths
