"""What the start of a run imports: little before its first line, and later only what it needs."""

import subprocess
import sys
from pathlib import Path

HEAVY = "{'torch._dynamo', 'megatron', 'rich', 'deepspeed', 'wandb'}"


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_first_line_comes_before_torch(tiny: Path, tmp_path: Path) -> None:
    code = "sys.modules['torch'] = None; from trainer.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", f"import sys; {code}", str(tiny), f"run_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}: 6 steps on 1 process; loading torch\n"
    assert "ModuleNotFoundError" in done.stderr


def test_one_process_imports_nothing_that_it_does_not_need() -> None:
    modules = (
        "trainer.process.failures, trainer.preflight, trainer.trainer, trainer.planning.fit_device"
    )
    modules += ", trainer.planning.expected_memory, trainer.planning.out_of_memory"
    assert run(f"import {modules}; print({HEAVY} & set(sys.modules))") == "set()"
