"""A corpus with filters in several work items, and what kills a process at work on it."""

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import data.prepare.engines.engine
import data.prepare.work_item
from data.config import DataConfig
from tests.data.prepare.filters.made import words

PROCESS_BYTES = 100_000  # worth processes: the stages of documents, and not those of signatures


def some_parts(config: DataConfig, folder: Path, patch: pytest.MonkeyPatch) -> DataConfig:
    """Six work items of code and prose with duplicates; a tokenised one takes a quarter second."""
    texts = [
        text.read_text("utf-8") for text in sorted(Path(os.__file__).parent.glob("asyncio/*.py"))
    ]
    prose = words(random.Random(0), 120)
    for i in range(6):
        (folder / f"{i}.jsonl").write_text(lines(texts[i::6] + texts[:2] + [prose]))
    patch.setattr(data.prepare.work_item, "_ITEM_BYTES", 1)
    patch.setattr(data.prepare.engines.engine, "_BYTES_PER_PROCESS", PROCESS_BYTES)
    sources = [{"name": "code", "paths": [str(folder / "*.jsonl")], "domain": "code"}]
    fields = {"sources": sources, "shards": str(folder / "shards"), "prepare_workers": 1}
    return DataConfig.model_validate(config.model_dump() | fields | {"filters": {}})


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def contents(config: DataConfig) -> dict[str, bytes]:
    root = Path(config.shards)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def elsewhere(config: DataConfig, name: str, **fields: object) -> DataConfig:
    shards = str(Path(config.shards).with_name(name))
    return DataConfig.model_validate(config.model_dump() | {"shards": shards} | fields)


@contextmanager
def killer(config: DataConfig, pattern: str) -> Iterator[list[str]]:
    """Kills the process of the first task at work, once; yields the names of the tasks.

    Arguments:
        pattern: of the file that has to be there before, in the unfinished folder.
    """
    killed: list[str] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set() and not killed:
            for log in Path(config.shards).glob(".unfinished-*/logs/*.log"):
                if not list(log.parent.parent.glob(pattern)):
                    break
                last = log.read_text().splitlines()[-1:]
                begun = re.search(r"process (\d+): begins", last[0]) if last else None
                if begun:
                    with suppress(ProcessLookupError):
                        os.kill(int(begun[1]), signal.SIGKILL)
                        killed.append(log.stem)
                        break
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()
