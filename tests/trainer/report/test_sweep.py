"""The report of a sweep reads the trials of the folder that is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.process.errors import ReportError
from trainer.report import write_sweep_report

TRIAL = {"folder": "trial-0000", "state": "complete", "parameters": {"seed": 1, "steps": 2}}
SWEEP: dict[str, Any] = {"metric": "loss", "goal": "minimize", "planned": 1, "trials": [TRIAL]}


def write(folder: Path, sweep: dict[str, Any], trial: str = "trial-0000") -> None:
    folder.mkdir(exist_ok=True)
    (folder / trial).mkdir()
    (folder / trial / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (folder / "sweep.json").write_text(json.dumps(sweep))


def test_a_report_of_one_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, SWEEP)
    assert write_sweep_report(tmp_path) == tmp_path / "report.html"
    assert "loss 2.5000" in capsys.readouterr().out


@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_trial_outside_the_folder_is_refused(tmp_path: Path, is_absolute: bool) -> None:
    outside = f"{tmp_path}/other" if is_absolute else "../other"
    write(tmp_path / "sweep", SWEEP | {"trials": [TRIAL | {"folder": outside}]}, outside)
    with pytest.raises(ReportError, match=r"trials\.0\.folder: '.*' should be a relative path"):
        write_sweep_report(tmp_path / "sweep")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"sweep\.json: cannot be read: No such file"):
        write_sweep_report(tmp_path)
    (tmp_path / "sweep.json").write_text('{"metric": "loss"}')
    with pytest.raises(ReportError, match=r"sweep\.json: is damaged: goal: Field required"):
        write_sweep_report(tmp_path)
