"""`v4 generate` and `v4 chat` as processes: several that share a model, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.tiny import tiny_config
from tests.trainer.tiny import train
from trainer.commands import main
from trainer.config import ConfigError
from trainer.generate.ranks import shared_degrees

V4 = [sys.executable, "-m", "launch"]
GREEDY = ["--temperature=0", "--max-new-tokens=12"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("processes") / "run", "steps=2").run_dir


def v4(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*V4, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, input=stdin)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them reads standard input for both."""
    generate = ["generate", str(run), *GREEDY, "--json", "--file=-"]
    chat = ["chat", str(run), *GREEDY]
    for command in (generate, chat):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na\n"))
        assert main(command) == 0
        alone = capsys.readouterr().out
        together = v4(*command, "--nproc=2", stdin="the cat\na\n")
        assert together.returncode == 0, together.stderr
        assert together.stdout == alone and alone
        assert together.stderr.count("tokens/s") == (1 if command is generate else 2)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_stream(run: Path, processes: int) -> None:
    command = [*V4, "generate", str(run), "the cat", f"--nproc={processes}"]
    pipe = subprocess.PIPE
    command.append("--max-new-tokens=4000")
    with subprocess.Popen(
        command, bufsize=0, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) <= len("the cat"):
            begun += process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    text, lines = (begun + out).decode(errors="replace"), err.decode().splitlines()
    assert process.returncode == 130, lines
    assert text.startswith("the cat") and text.endswith("\n")
    assert lines[-1] == "v4: interrupted" and "Traceback" not in err.decode()


@pytest.mark.slow
def test_one_sentence_about_a_model_that_does_not_divide(run: Path) -> None:
    done = v4("generate", run, "a", "--nproc=3")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("v4: error: "))
    assert "--nproc 3: model.n_routed_experts" in line


def test_degrees_of_processes_that_share_a_model() -> None:
    config = tiny_config(o_groups=2, num_attention_heads=4, n_routed_experts=8, vocab_size=96)
    assert [shared_degrees(config, n).tensor for n in (1, 2, 4, 8)] == [1, 2, 2, 2]
    assert shared_degrees(config, 4).expert == 4
    with pytest.raises(ConfigError, match=r"--nproc 3: model\.n_routed_experts"):
        shared_degrees(config, 3)
