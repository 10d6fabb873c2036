"""Long work reports itself; short work stays silent."""

import errno
import io
import time

import pytest

from data import activity
from data.activity import Activity, print_line, whole_seconds


class FullDisk(io.StringIO):
    """A log that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "")


def test_a_line_that_cannot_be_printed_ends_nothing() -> None:
    print_line("text", FullDisk())


def test_lines_come_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(activity, "REPORT_SECONDS", (0.05, 0.1, 0.3))
    with Activity("loading"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and set(lines) <= {"v4: loading, 0 s", "v4: loading, 1 s"}
    with Activity("loading", visible=False):
        time.sleep(0.2)
    with Activity("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_after_the_last_time_the_interval_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(activity, "REPORT_SECONDS", (0.1,))
    with Activity("loading"):
        time.sleep(0.55)
    assert 3 <= capsys.readouterr().err.count("\n") <= 5


def test_a_total_gives_an_estimate() -> None:
    work = Activity("validation", 5000, "batches")
    assert work.describe(10.0) == "v4: validation: 0 of 5,000 batches, 10 s"
    work.advance(1000)
    assert work.describe(10.0) == (
        "v4: validation: 1,000 of 5,000 batches, 10 s, about 0:00:40 left"
    )
    work.advance(4000)
    assert work.describe(50.0) == "v4: validation: 5,000 of 5,000 batches, 50 s"


def test_any_duration_can_be_printed() -> None:
    assert str(whole_seconds(99.6)) == "0:01:40"
    assert "days" in str(whole_seconds(1e30))
