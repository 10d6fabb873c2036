"""Time, memory and disk of the deduplication against the number of documents.

    python -m benchmarks.data.dedup FOLDER [--documents 1000000 2000000] [--memory 2147483648]

Signatures are made directly, 793 bytes each. Of the documents, 15% repeat an earlier text, 10% are
near copies and 5% pages of templates; early documents have more copies, as popular ones do. For
each size, the tasks run one after another in one process, and the files are removed after it.
Prints seconds, peak memory (beyond that before the first stage) and written bytes of each stage,
how many of the planted duplicates were found and how many other documents were dropped, and a fit
over the sizes. Needs about 1.2 kB of disk a document.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.config import DataConfig, FiltersConfig, SourceConfig
from data.prepare.dedup import remove_dedup_files, signature_file, stages, verdict_file
from data.prepare.filters import EXACT, KEPT, NEAR, TEMPLATE
from data.prepare.signatures import NEAR_SLOTS, SIGNATURE, TEMPLATE_SLOTS
from data.prepare.task import Preparation
from data.prepare.work_item import WorkItem
from data.text import Tokenizer

_ITEM = 20_000  # documents of a work item
_EXACT, _NEAR, _PAGES = 0.15, 0.10, 0.05  # shares of the documents
_PER_TEMPLATE = 400  # documents of all kinds for each template: 20 pages
_NOISE = 0.1  # share of the values of a copy that differ
_STAGES = "seconds", "CPU s", "peak MiB", "written MB"


@compiled
def _mix(first: Any, second: Any) -> Any:
    value = np.uint64(first) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(second)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def _resolve(kinds: NDArray[np.uint8], targets: Any, templates: Any) -> Any:
    """(document with the same text, one with the same words, template) of each document."""
    bases = np.empty((len(kinds), 3), dtype=np.int64)
    for i in range(len(kinds)):
        bases[i] = i, i, i
        if kinds[i] == EXACT:
            bases[i] = bases[targets[i]]
        elif kinds[i] == NEAR:
            bases[i, 1:] = bases[targets[i], 1:]
        elif kinds[i] == TEMPLATE:
            bases[i, 2] = len(kinds) + templates[i]
    return bases


@compiled
def _fill(values: Any, text: Any, base: Any, first: int, noise: float) -> None:
    """Signatures [N, K] as those of `base`, with a share of other values where `text` differs."""
    limit = np.uint64(noise * 2.0**32)
    for i in range(len(values)):
        for k in range(values.shape[1]):
            own = _mix(text[i], first + k)
            is_other = text[i] != base[i] and (own >> np.uint64(32)) < limit
            value = own if is_other else _mix(base[i], 1000 + first + k)
            values[i, k] = value & np.uint64(0xFFFFFFFF)


def make(folder: Path, documents: int) -> tuple[tuple[WorkItem, ...], NDArray[Any]]:
    """Writes the signatures; returns the work items and the filter that should drop each."""
    rng = np.random.default_rng(documents)
    shares = np.cumsum([_EXACT, _NEAR, _PAGES])
    kinds = np.array([EXACT, NEAR, TEMPLATE, KEPT], np.uint8)[
        np.searchsorted(shares, rng.random(documents))
    ]
    kinds[0] = KEPT
    targets = (np.arange(documents) * rng.random(documents) ** 3).astype(np.int64)
    groups = 1 + documents // _PER_TEMPLATE
    templates = (groups * rng.random(documents) ** 2).astype(np.int64)
    bases = _resolve(kinds, targets, templates)
    source = SourceConfig(name="made", paths=("x",))
    items = []
    for start in range(0, documents, _ITEM):
        rows = bases[start : start + _ITEM]
        records = np.zeros(len(rows), dtype=SIGNATURE)
        records["exact"] = _mixed(rows[:, 0])
        for field, base, slots in (("near", 1, NEAR_SLOTS), ("template", 2, TEMPLATE_SLOTS)):
            values = np.empty((len(rows), slots), dtype=np.uint32)
            _fill(values, rows[:, 0].copy(), rows[:, base].copy(), 300 * base, _NOISE)
            records[field] = values
        items.append(WorkItem(source=source, number=len(items), pieces=()))
        signature_file(items[-1].name, folder).write_bytes(records.tobytes())
    pages = np.flatnonzero(kinds == TEMPLATE)
    _, first, group = np.unique(templates[pages], return_index=True, return_inverse=True)
    large = np.bincount(group) >= FiltersConfig().template_min_documents
    kinds[pages[~large[group]]] = KEPT
    kinds[pages[first]] = KEPT
    return tuple(items), kinds


@compiled
def _mixed(numbers: Any) -> Any:
    result = np.empty(len(numbers), dtype=np.uint64)
    for i in range(len(numbers)):
        result[i] = _mix(numbers[i], 7)
    return result


def _status(field: str) -> float:
    """A field of this process's status, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: Path, documents: int, memory: int) -> dict[str, Any]:
    """Seconds, peak memory and written bytes of each stage, and what was found."""
    warm = folder / "warm"
    warm.mkdir()
    deduplicate(warm, make(warm, 1000)[0], memory)  # compiles, and loads what is imported late
    shutil.rmtree(warm)
    items, planted = make(folder, documents)
    result = deduplicate(folder, items, memory)
    reasons = np.concatenate([np.load(verdict_file(item.name, folder))["reason"] for item in items])
    result["dropped"] = {}
    for name, kind in (("exact", EXACT), ("near", NEAR), ("template", TEMPLATE)):
        both = int(((planted == kind) & (reasons == kind)).sum())
        result["dropped"][name] = [int((planted == kind).sum()), both]
    result["wrong"] = int(((planted == KEPT) & (reasons != KEPT)).sum())
    return result | {"documents": documents, "memory": memory}


def deduplicate(folder: Path, items: tuple[WorkItem, ...], memory: int) -> dict[str, Any]:
    """Runs all tasks in this process."""
    config = DataConfig.model_validate(
        {
            "sources": [items[0].source],
            "tokenizer": {"path": "none"},
            "shards": str(folder),
            "seq_len": 8,
            "global_batch_size": 1,
        }
    )

    def no_tokenizer() -> Tokenizer:
        raise AssertionError

    preparation = Preparation(config, folder, items, no_tokenizer)
    measured: dict[str, tuple[float, ...]] = {}
    base = _status("VmRSS")
    peak_disk, tasks_done = 0.0, 0
    for tasks in stages(items, folder, FiltersConfig(), memory):
        _reset_peak()
        begin, cpu = time.monotonic(), time.process_time()
        for task in tasks:
            task.run(preparation, lambda _size: None)
        seconds = time.monotonic() - begin, time.process_time() - cpu
        tasks_done += len(tasks)
        files = [path for path in (folder / "dedup").iterdir() if path.suffix == ".bin"]
        sizes = {path: path.stat().st_size / 1e6 for path in files}
        stage = tasks[0].group
        written = sum(size for path, size in sizes.items() if path.name.startswith(f"{stage}-0"))
        measured[stage] = *seconds, _status("VmHWM") - base, written
        peak_disk = max(peak_disk, sum(sizes.values()))
    remove_dedup_files(folder)
    return {"stages": measured, "peak_disk": peak_disk, "tasks": tasks_done}


def report(result: dict[str, Any]) -> None:
    """Prints one size."""
    totals = np.array(list(result["stages"].values()))
    print(f"\n{result['documents']:,} documents, {result['memory'] >> 20:,} MiB")
    print(f"{'stage':<20}" + "".join(f"{name:>12}" for name in _STAGES))
    for stage, values in result["stages"].items():
        print(f"{stage:<20}" + "".join(f"{value:12.1f}" for value in values))
    total = *totals[:, :2].sum(axis=0), totals[:, 2].max(), totals[:, 3].sum()
    print(f"{'all':<20}" + "".join(f"{value:12.1f}" for value in total))
    planted = ", ".join(f"{name} {b:,} of {a:,}" for name, (a, b) in result["dropped"].items())
    print(f"found: {planted}; dropped of the others: {result['wrong']:,}")
    print(f"{result['tasks']:,} tasks, at most {result['peak_disk']:,.0f} MB on disk", flush=True)


def main() -> None:
    """Measures each size in a process of its own."""
    parser = argparse.ArgumentParser("python -m benchmarks.data.dedup", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 2_000_000])
    parser.add_argument("--memory", type=int, default=2 << 30)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.folder, options.documents[0], options.memory)))
        return
    results = []
    for documents in options.documents:
        folder = options.folder / str(documents)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.data.dedup", str(folder), "--one"]
        command += ["--documents", str(documents), "--memory", str(options.memory)]
        try:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        finally:
            shutil.rmtree(folder)
        results.append(json.loads(done.stdout))
        report(results[-1])
    if len(results) > 1:
        sizes = np.log([result["documents"] for result in results])
        for column, name in enumerate(_STAGES[:2]):
            spent = [sum(stage[column] for stage in r["stages"].values()) for r in results]
            slope, offset = np.polyfit(sizes, np.log(spent), 1)
            print(f"fit, {name}: {math.exp(offset) * 1e6:.3f} us x documents ^ {slope:.3f}")


if __name__ == "__main__":
    main()
