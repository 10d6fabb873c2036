"""Commands in messages work when they are pasted."""

import shlex
import subprocess
from pathlib import Path

import pytest

from trainer.process.command_line import resume_command, v4


def test_it_runs_wherever_v4_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command = shlex.split(v4("train", "--help"))
    assert command[0] != "v4"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--nproc-per-node" in done.stdout


def test_the_path_is_quoted() -> None:
    folder = Path("runs/my run; rm *")
    assert shlex.split(resume_command(folder, {}))[-2:] == ["train", str(folder)]


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, []),
        ({"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}, [4]),
        ({"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}, [4, 3]),
        ({"WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}, [1, 3]),
    ],
)
def test_processes_and_restarts_are_repeated(
    environment: dict[str, str], options: list[int]
) -> None:
    command = shlex.split(resume_command(Path("runs/a"), environment))
    expected = [f"--nproc-per-node={n}" for n in options[:1] if n > 1]
    expected += [f"--max-restarts={n}" for n in options[1:]]
    assert command[command.index("train") + 1 :] == ["runs/a", *expected]


def test_on_several_hosts_it_is_the_same_job() -> None:
    text = resume_command(Path("runs/a"), {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"})
    assert text == "start the same job, or the same command on every host, for runs/a"
