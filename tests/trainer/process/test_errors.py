"""How a command ends: one sentence for what the user or the machine lacks, a traceback for bugs."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from tests.full_disk import full_disk
from trainer.process.errors import SaveError, run_or_explain


def open_missing() -> None:
    Path("/nowhere/file").read_bytes()


def rename_missing() -> None:
    os.rename("/nowhere/one", "/nowhere/two")


def too_large_for_torch() -> None:
    torch.empty(1 << 55)


def too_large_for_numpy() -> None:
    np.empty(1 << 55)


def no_room_for_a_library() -> None:
    try:
        raise ImportError("libtorch.so: failed to map segment from shared object")
    except ImportError:
        raise OSError("a package cannot load its library") from None


def mistake() -> None:
    raise DataError("a source is empty.")


def stale() -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


STALE_LINE = stale.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (mistake, "a source is empty."),
        (open_missing, "/nowhere/file: No such file or directory"),
        (rename_missing, "/nowhere/one to /nowhere/two: No such file or directory"),
        (too_large_for_torch, "out of memory: can't allocate memory: you tried to allocate 1441"),
        (no_room_for_a_library, "out of memory: libtorch.so: failed to map segment"),
        (too_large_for_numpy, "out of memory: Unable to allocate 256. PiB"),
    ],
)
def test_one_sentence(
    action: Callable[[], None], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_or_explain(action) == 2
    out = capsys.readouterr().err
    assert out.startswith(f"v4: error: {sentence}") and out.count("\n") == 1, out


def unsaved(number: int) -> None:
    """As a checkpoint that cannot be written."""
    try:
        raise OSError(number, os.strerror(number), "/server/file")
    except OSError as error:
        raise SaveError(f"the checkpoint could not be written: {error.strerror}") from None


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((n, 1) for n in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN)),
        *((n, 1) for n in (errno.EHOSTDOWN, errno.ECONNRESET, errno.ENOTCONN)),
        *((n, 2) for n in (errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)),
    ],
)
def test_what_may_pass_has_exit_code_1(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = {1: "v4: failed: ", 2: "v4: error: "}[code]
    assert run_or_explain(lambda: unsaved(number)) == code
    text = f"the checkpoint could not be written: {os.strerror(number)}"
    assert capsys.readouterr().err == f"{prefix}{text}\n"


def test_what_may_pass_names_our_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_or_explain(stale) == 1
    place = f"tests/trainer/process/test_errors.py, line {STALE_LINE}"
    assert capsys.readouterr().err == f"v4: failed: {place}: Stale file handle\n"


def test_a_full_disk_names_our_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with full_disk(10), open(tmp_path / "file", "wb", buffering=0) as file:
            file.write(bytes(10))
            file.write(bytes(10))

    assert run_or_explain(write) == 2
    assert "test_errors.py, line " in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_fault_of_ours_is_raised(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error), match="a bug"):
        run_or_explain(fail)


def python(code: str, *, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, sys\nfrom trainer.process.errors import run_or_explain\n"
    command = [sys.executable, "-c", head + code]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


def test_stdout_on_a_full_disk_is_one_sentence() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = python("sys.exit(run_or_explain(lambda: print('numbers')))", stdout=full)
    os.close(full)
    assert done.returncode == 2
    assert done.stderr.startswith("v4: error: ") and "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_that_left_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = python("sys.exit(run_or_explain(lambda: print('x' * 100_000)))", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_closed_streams_lead_nowhere(tmp_path: Path) -> None:
    """Nothing that is printed gets into a file that is opened later."""
    code = "from data.activity import prepare_streams, print_line\nprepare_streams()\n"
    code += f"file = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
    code += "print('out')\nprint_line('err', sys.stderr)\nos.write(file, b'written')\n"
    code += "assert sys.stdin.read() == ''\n"
    code += "sys.exit(run_or_explain(lambda: print(file)))"
    head = "import os, sys\nfrom trainer.process.errors import run_or_explain\n"
    shell = ["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, head + code]
    assert subprocess.run(shell, timeout=60).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"written"


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)\n"


def test_ctrl_c_is_one_line() -> None:
    code = "from trainer.process.signals import raise_on_interrupt\nraise_on_interrupt()\n"
    code += f"def work():\n try:\n  {INTERRUPT} finally:\n  print('cleaned')\n"
    done = python(code + "sys.exit(run_or_explain(work))")
    assert (done.returncode, done.stderr, done.stdout) == (130, "v4: interrupted\n", "cleaned\n")


def test_ctrl_c_inside_an_import_ends_the_process(tmp_path: Path) -> None:
    """A library may catch everything while it is imported."""
    (tmp_path / "greedy.py").write_text(
        f"import os, signal\ntry:\n  {INTERRUPT}except BaseException:\n  pass\n"
    )
    code = "from trainer.process.signals import raise_on_interrupt\nraise_on_interrupt()\n"
    code += f"sys.path.insert(0, {str(tmp_path)!r})\nimport greedy\n"
    done = python(code)
    assert (done.returncode, done.stderr) == (130, "v4: interrupted\n")
