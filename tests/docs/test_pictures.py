"""Pictures and examples of docs/: pictures are drawn, timelines possible, examples run."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from docs import draw_parallelism
from docs.timeline import timeline

DOCS = Path(draw_parallelism.__file__).parent


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("1F1B", 1), ("Interleaved1F1B", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2)],
)
def test_timelines_are_possible(schedule: str, chunks: int) -> None:
    ranks, micro = 4, 8
    lines = timeline(schedule, ranks, micro, chunks)
    ends = {}
    for slots in lines:
        for (begin, length, *_), (after, *_) in pairwise(slots):
            assert begin + length <= after
        ends |= {tuple(what): begin + length for begin, length, *what in slots}
    starts = {tuple(what): begin for slots in lines for begin, _, *what in slots}
    last = ranks * chunks - 1
    every = {(k, s, m) for k in "FIW" for s in range(last + 1) for m in range(micro)}
    assert set(starts) == every and sum(map(len, lines)) == len(every)
    for (kind, stage, number), start in starts.items():
        if kind == "F" and stage > 0:
            assert ends["F", stage - 1, number] <= start
        if kind == "I":
            before = ("I", stage + 1, number) if stage < last else ("F", stage, number)
            assert ends[before] <= start
        if kind == "W":
            assert ends["I", stage, number] <= start
    if schedule == "1F1B":  # as parallelism.md says
        assert 1 - 3 * micro / max(ends.values()) == pytest.approx(
            (ranks - 1) / (micro + ranks - 1)
        )


def test_every_picture_of_the_text_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["draw", str(tmp_path)])
    draw_parallelism.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"\(images/(parallel-.*?)\)", (DOCS / "parallelism.md").read_text()))
    assert drawn == shown == {path.name for path in (DOCS / "images").glob("parallel-*.png")}
    assert all(path.stat().st_size < 200_000 for path in tmp_path.iterdir())


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_examples_run_as_they_stand(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)
    for example in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(example, str(page), "exec"), {})
