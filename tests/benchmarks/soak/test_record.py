"""What a soak would notice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.record import Comparison, fit
from benchmarks.soak.summary import fault_table, plot, sentences

REFERENCE = {step: {"step": step, "loss": 1.0 / step, "tokens": 100 * step} for step in range(1, 9)}


def write(path: Path, steps: range, **changes: Any) -> None:
    """Replaces a metrics file, as a resume does."""
    lines = [json.dumps({**REFERENCE[s], "time": float(s), **changes}) + "\n" for s in steps]
    path.with_suffix(".new").write_text("".join(lines))
    os.replace(path.with_suffix(".new"), path)


def test_every_line_is_compared_also_those_that_a_resume_drops(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    comparison = Comparison(REFERENCE, path)
    assert comparison.new_steps() == []
    write(path, range(1, 4))
    assert comparison.new_steps() == [1, 2, 3]
    with path.open("a") as stream:
        stream.write(json.dumps({**REFERENCE[4], "time": 4.0}) + "\n" + '{"step": 5')
    write(path, range(1, 3))  # resumed from step 2
    assert comparison.new_steps() == [4], "read before the file was replaced"
    with path.open("a") as stream:
        stream.write(json.dumps({**REFERENCE[3], "time": 9.0, "loss": 0.5}) + "\n")
    assert comparison.new_steps() == [3]
    assert comparison.differences == ["loss of step 3: 0.5 and 0.3333333333333333"]
    assert (comparison.last, comparison.highest, comparison.compared) == (3, 4, 5)


def test_a_line_that_an_evaluation_replaces_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    comparison = Comparison(REFERENCE, path)
    write(path, range(1, 4))
    assert comparison.new_steps() == [1, 2, 3]
    content = path.read_bytes().splitlines(keepends=True)
    with path.open("r+b") as stream:
        stream.truncate(sum(map(len, content[:2])))
        stream.seek(0, os.SEEK_END)
        record = {**REFERENCE[3], "time": 5.0, "validation_loss": 2.0}
        stream.write((json.dumps(record) + "\n").encode())
    assert comparison.new_steps() == [] and comparison.compared == 4
    with path.open("a") as stream:
        stream.write(json.dumps({**REFERENCE[4], "time": 6.0}) + "\n")
    assert comparison.new_steps() == [4]


def test_a_leak_has_a_slope() -> None:
    samples = [
        {"role": "rank", "pid": pid, "steps": 10 + t, "time": 60.0 * t, "rss": pid + 2.0 * t}
        for pid in (100, 5000)
        for t in range(10)
    ]
    line = fit(samples, "rank", "rss")
    assert line is not None and line.processes == 2
    assert line.slope == pytest.approx(120.0) and line.error == pytest.approx(0.0, abs=1e-6)
    assert fit(samples, "writer", "rss") is None


def test_table_and_plot_are_of_all_pieces(tmp_path: Path) -> None:
    events = [
        {"event": "fault", "fault": "SIGKILL of all", "repeated": 3, "seconds": 9.0, "lost": False},
        {"event": "round", "complete": True, "compared": 70, "differences": [], "tensors": 9},
        {"event": "piece", "minutes": 2.0},
        {"event": "piece", "minutes": 3.0},
    ]
    for number, event in enumerate(events):
        event |= {"time": 1000.0 + 300 * number, "different_tensors": 0}
    samples = [
        {"role": "rank", "pid": 1, "steps": 10 + t, "time": 1000.0 + t, "rss": 2**20, "files": 7}
        for t in range(5)
    ]
    text = "\n".join(sentences(events, samples))
    assert "5 minutes in 2 pieces, 1 faults, of which 1 killed ranks; 1 complete runs" in text
    assert "70 records compared with the undisturbed run's, 0 different" in text
    assert "rank: 1 MiB resident, +0.00" in text
    assert fault_table(events).row_count == 11
    plot(events, samples, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
