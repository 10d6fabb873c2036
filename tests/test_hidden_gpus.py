"""Tests compute on the CPU, also where there is a GPU; only `-m gpu` shows it to them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TEST = """
import os
import pytest

@pytest.mark.gpu
def test_marked():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"

def test_other():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
"""


@pytest.mark.parametrize(
    ("marks", "outcome"),
    [("not slow", "1 passed, 1 skipped"), ("gpu", "1 passed, 1 deselected")],
)
def test_only_tests_that_are_marked_see_a_gpu(marks: str, outcome: str, tmp_path: Path) -> None:
    conftest = CONFTEST.read_text()
    for call, value in (
        ("torch.cuda.is_available()", "os.environ['CUDA_VISIBLE_DEVICES']"),
        ("torch.cuda.get_device_capability()", "(9, 0)"),
    ):
        assert call in conftest
        conftest = conftest.replace(call, value)
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text(TEST)
    settings = ["-q", "-m", marks, "-p", "no:cacheprovider", "-o", "markers=gpu", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout, done.stdout + done.stderr
