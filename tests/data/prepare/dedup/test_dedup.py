"""The same documents are kept under any limit of memory, order of tasks, and number of kills."""

import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import FiltersConfig
from data.errors import DataError
from data.prepare.dedup import remove_dedup_files, signature_file, stages, verdict_file
from data.prepare.signatures import SIGNATURE
from data.prepare.work_item import WorkItem
from tests.data.prepare.dedup.made import (
    expected,
    made_signatures,
    preparation,
    run_stages,
    write_items,
)


def random_filters(rng: np.random.Generator) -> FiltersConfig:
    return FiltersConfig(
        exact_duplicates=rng.random() < 0.8,
        near_duplicate_similarity=rng.choice([None, 0.7, 0.8, 0.9], p=[0.1, 0.3, 0.3, 0.3]),
        template_similarity=rng.choice([None, 0.5, 0.6, 0.8], p=[0.1, 0.3, 0.3, 0.3]),
        template_min_documents=int(rng.integers(2, 12)),
    )


def check(folder: Path, items: tuple[WorkItem, ...], verdicts: list[Any]) -> None:
    """The files are the expected ones to the byte; removes them."""
    for item, verdict in zip(items, verdicts, strict=True):
        stream = BytesIO()
        np.save(stream, verdict, allow_pickle=False)
        file = verdict_file(item.name, folder)
        assert file.read_bytes() == stream.getvalue()
        file.unlink()


@pytest.mark.parametrize("seed", range(4))
def test_any_settings_give_the_reference(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 150))
    records = made_signatures(rng, count, max(1, count // 4))
    cuts = np.sort(rng.integers(0, count + 1, rng.integers(0, 9))).tolist()  # some are empty
    items = write_items(tmp_path, records, cuts)
    filters = random_filters(rng)
    verdicts = expected(records, cuts, filters)
    for memory in (64 * count, 400 * count, 1 << 30):
        run_stages(tmp_path, items, filters, memory, rng)
        check(tmp_path, items, verdicts)
        assert {path.name for path in (tmp_path / "dedup").iterdir()} == {
            "first.npy",
            "progress.json",
        }
        remove_dedup_files(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            f"{item.name}.filter.bin" for item in items
        }


def test_an_interrupted_deduplication_continues(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    records = made_signatures(rng, 120, 30)
    cuts = [50, 90]
    items = write_items(tmp_path, records, cuts)
    filters = FiltersConfig(template_min_documents=3)
    memory = 64 * 120
    folder = tmp_path / "dedup"
    runs, most_files, alive = 0, 0, True
    while alive:
        runs += 1
        left = 25  # tasks until the process dies
        alive = False
        for tasks in stages(items, tmp_path, filters, memory):
            for task in tasks:
                if task.is_done(tmp_path):
                    continue
                if not left:
                    alive = True
                    break
                task.run(preparation(tmp_path, items), lambda _size: None)
                left -= 1
            most_files = max(most_files, sum(1 for _ in folder.iterdir()))
            if alive:
                (folder / ".near-00000.bin.0123").write_bytes(b"torn")
                break
    assert runs > 4
    check(tmp_path, items, expected(records, cuts, filters))
    assert not list(stages(items, tmp_path, filters, memory))  # done, whatever the memory
    assert not list(stages(items, tmp_path, filters, 1 << 30))
    assert {path.name for path in folder.iterdir()} == {"first.npy", "progress.json"}


def test_few_documents_are_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rng = np.random.default_rng(6)
    records = made_signatures(rng, 120, 30)
    items = write_items(tmp_path, records, [50])
    done = run_stages(tmp_path, items, FiltersConfig(), 64 * 120, rng)
    assert [[task.name for task in tasks] for tasks in done] == [["deduplicate"]]
    assert not list(stages(items, tmp_path, FiltersConfig(), 64 * 120))
    check(tmp_path, items, expected(records, [50], FiltersConfig()))
    # Without one of the verdicts' marks, the task is not done.
    remove_dedup_files(tmp_path)
    assert not done[0][0].is_done(tmp_path)


def test_truncated_signatures_end_the_task(tmp_path: Path) -> None:
    items = write_items(tmp_path, np.zeros(40, dtype=SIGNATURE), [20])
    tasks = next(iter(stages(items, tmp_path, FiltersConfig(), 1 << 26)))
    file = signature_file(items[1].name, tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"made-00001.filter.bin was truncated meanwhile; run"):
        tasks[0].run(preparation(tmp_path, items), lambda _size: None)
    assert not tasks[0].is_done(tmp_path)
    assert not list((tmp_path / "dedup").glob(".*"))  # nothing of the failed attempt is left


def test_other_work_items_or_memory_begin_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    records = made_signatures(rng, 100, 30)
    items = write_items(tmp_path, records, [50, 90])
    filters = FiltersConfig()
    first = next(iter(stages(items, tmp_path, filters, 64 * 100)))
    first[0].run(preparation(tmp_path, items), lambda _size: None)
    tasks = next(iter(stages(items, tmp_path, filters, 640 * 100)))
    assert len(tasks) < len(first) and not any(task.is_done(tmp_path) for task in tasks)
    run_stages(tmp_path, items, filters, 1 << 30, rng)
    # One work item is left out: the numbers of the others in the verdicts change.
    run_stages(tmp_path, items[1:], filters, 1 << 30, rng)
    check(tmp_path, items[1:], expected(records[50:], [40], filters))


def test_memory_is_bounded_however_the_keys_are_distributed(tmp_path: Path) -> None:
    """Every document has a key of the first one, and all templates are one group."""
    rng = np.random.default_rng(9)
    records = np.zeros(100_000, dtype=SIGNATURE)
    records["exact"] = np.arange(len(records))
    for field in ("near", "template"):
        records[field] = rng.integers(0, 1 << 32, records[field].shape, dtype=np.uint32)
    records["near"][:, 8:16] = 1
    records["template"][:, 20:] = 2
    items = write_items(tmp_path, records, [])
    del records
    peaks = []
    for memory in (1 << 26, 1 << 30):
        peaks.append(0)
        for tasks in stages(items, tmp_path, FiltersConfig(), memory):
            for task in tasks:
                tracemalloc.start()
                task.run(preparation(tmp_path, items), lambda _size: None)
                peaks[-1] = max(peaks[-1], tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
        reasons = np.load(verdict_file(items[0].name, tmp_path))["reason"]
        assert not reasons[0] and (reasons[1:] == 7).all()
        remove_dedup_files(tmp_path)
    assert peaks[0] < 1 << 26 < peaks[1], peaks
