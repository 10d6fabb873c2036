"""What code under test cannot do, each claim of docs/post-training.md tried."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.config.post import SandboxConfig
from trainer.post.checkers.sandbox import Outcome, Program, Sandbox
from trainer.process.errors import PostTrainingError

QUICK: dict[str, Any] = {"wall_seconds": 5.0, "cpu_seconds": 2}


def run(source: str, **settings: Any) -> Outcome:
    return Sandbox(SandboxConfig(**QUICK, **settings)).run(Program(source))


def raises(source: str, error: str, **settings: Any) -> None:
    """Asserts that code is stopped isolated, and is not without: the test can fail."""
    outcome = run(source, **settings)
    assert outcome.status == "failed", outcome
    assert outcome.error.startswith(error), outcome
    free = run(source, unisolated=True, **settings)
    assert free.status == "finished", free


def test_code_tests_and_calls() -> None:
    source = "import math\ndef half(x):\n    print('half of', x)\n    return x / 2\n"
    calls = [("half", [3]), ("half", ["a"]), ("other", [])]
    outcome = Sandbox(SandboxConfig()).run(Program(source, "assert half(4) == 2", calls))
    assert outcome.status == "finished"
    assert outcome.values[0] == {"value": 1.5}
    assert outcome.values[1]["error"].startswith("TypeError")
    assert outcome.values[2]["error"].startswith("KeyError")
    assert outcome.output == "half of 4\nhalf of 3\nhalf of a\n"


@pytest.mark.parametrize(
    "source, status, error",
    [
        ("1 / 0", "failed", "ZeroDivisionError"),
        ("def f(:", "failed", "SyntaxError"),
        ("\ud800", "failed", "UnicodeEncodeError"),
        ("x = '\\0'\n\0", "failed", "SyntaxError"),
        ("raise SystemExit(0)", "failed", "SystemExit"),
        ("import os; os._exit(0)", "died", "it ended with exit code 0 before its tests did"),
        ("import ctypes; ctypes.string_at(0)", "died", "it ended by signal 11"),
        ("class E(Exception):\n def __str__(self): 1 / 0\nraise E", "failed", "an exception"),
    ],
)
def test_code_that_fails(source: str, status: str, error: str) -> None:
    outcome = run(source)
    assert outcome.status == status
    assert outcome.error.startswith(error)


def test_what_ordinary_code_needs_works() -> None:
    source = """
import collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, io
import itertools, json, math, random, re, statistics, string, tempfile, time, typing, zlib
with open("a.txt", "w") as file:
    file.write("one")
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("two")
assert open("a.txt").read() == "one"
time.sleep(0.01)
assert random.Random(1).random() and hashlib.sha256(b"").hexdigest()
assert datetime.datetime.now(datetime.timezone.utc).year > 2000
"""
    assert run(source).status == "finished"


def test_hashes_are_the_same_in_every_process() -> None:
    first, second = (run("print(hash('a'))").output for _ in range(2))
    assert first == second != ""


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/proc/1/cmdline", __file__])
def test_files_cannot_be_read(path: str) -> None:
    raises(f"open({path!r}, 'rb').read()", "PermissionError")


def test_the_run_folder_cannot_be_read_or_listed_or_changed(tmp_path: Path) -> None:
    secret = tmp_path / "checkpoint"
    secret.write_text("weights")
    for source in (
        f"open({str(secret)!r}).read()",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.chdir({str(tmp_path)!r}); open('checkpoint').read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.chmod({str(secret)!r}, 0o600)",
        f"import os; os.utime({str(secret)!r})",
        f"import os; os.symlink({str(secret)!r}, 'link'); open('link').read()",
        f"import os; os.link({str(secret)!r}, 'link'); open('link').read()",
        f"import os; os.truncate({str(secret)!r}, 7)",
        f"import os; os.rename({str(secret)!r}, {str(secret)!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
    ):
        raises(source, "PermissionError")
        (tmp_path / "new").unlink(missing_ok=True)
    assert secret.read_text() == "weights"


@pytest.mark.parametrize("access", ["O_RDONLY", "O_ACCMODE"])
def test_what_can_be_read_cannot_be_truncated(tmp_path: Path, access: str) -> None:
    """Not by Landlock alone, whose first versions would allow it."""
    path = tmp_path / "package.py"
    path.write_text("value = 3")
    source = f"import os\nos.O_ACCMODE = 3\nos.open({str(path)!r}, os.{access} | os.O_TRUNC)"
    outcome = run(source, readable=[str(tmp_path)])
    assert outcome.error.startswith("PermissionError: [Errno 1]")
    assert path.read_text() == "value = 3"
    assert run(source, readable=[str(tmp_path)], unisolated=True).status == "finished"
    assert path.read_text() == ""


def test_its_own_folder_is_empty_and_is_removed() -> None:
    source = "import os\nprint(os.listdir())\nopen('left', 'w')\nprint(os.getcwd())"
    listing, folder = run(source).output.splitlines()
    assert listing == "[]"
    assert not Path(folder).exists()


@pytest.fixture
def server() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_no_network(server: int) -> None:
    raises(
        f"import socket; socket.create_connection(('127.0.0.1', {server}), 3)", "PermissionError"
    )
    for family, kind in (("AF_INET", "SOCK_DGRAM"), ("AF_UNIX", "SOCK_STREAM")):
        raises(f"import socket; socket.socket(socket.{family}, socket.{kind})", "PermissionError")
    outcome = run("import socket; socket.create_connection(('192.0.2.1', 80), 1)")
    assert outcome.error.startswith("PermissionError")


def test_the_environment_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    names = run("import os; print(*sorted(os.environ))").output.split()
    assert names == ["HOME", "LANG", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "TMPDIR"]
    raises(f"open('/proc/{os.getpid()}/environ', 'rb').read()", "PermissionError")


def test_no_processes_threads_or_programs() -> None:
    raises("import os\nif not os.fork(): os._exit(0)", "PermissionError")
    raises("import threading; threading.Thread(target=int).start()", "RuntimeError")
    raises("import subprocess; subprocess.run(['true'])", "PermissionError")
    raises(
        "import os\nif os.path.exists('x'): os.execv('/bin/true', ['true'])\n"
        "import posix; posix.posix_spawn('/bin/true', ['true'], {})",
        "PermissionError",
    )


def test_a_fork_bomb_has_no_effect_and_no_daemon_stays() -> None:
    before = len(psutil.pids())
    outcome = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert outcome.status in ("timeout", "died")  # whichever limit comes first
    assert len(psutil.pids()) < before + 20


def test_no_signals_to_other_processes() -> None:
    me = os.getpid()
    raises(f"import os; os.kill({me}, 0)", "PermissionError")
    raises("import os; os.kill(os.getppid(), 0)", "PermissionError")
    raises("import os; os.kill(-1, 0)", "PermissionError")
    own = "import fcntl, os\nread, write = os.pipe()\n"
    raises(f"{own}fcntl.fcntl(read, fcntl.F_SETOWN, {me})", "PermissionError")
    raises(f"{own}fcntl.fcntl(read, fcntl.F_SETSIG, 0)", "PermissionError")


def test_limits_cannot_be_raised_and_those_of_others_not_set() -> None:
    raises("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "ValueError")
    raises(
        f"import resource; resource.prlimit({os.getpid()}, resource.RLIMIT_CORE)",
        "PermissionError",
    )


def test_memory() -> None:
    outcome = run("x = bytearray(10 << 30)")
    assert outcome.status == "failed"
    assert outcome.error.startswith("MemoryError")


def test_time() -> None:
    start = time.monotonic()
    sleeping = Sandbox(SandboxConfig(wall_seconds=0.5))
    assert sleeping.run(Program("import time; time.sleep(1e6)")).status == "timeout"
    closing = "import os, time\nos.closerange(0, 64)\ntime.sleep(1e6)"
    assert sleeping.run(Program(closing)).status == "died"
    assert time.monotonic() - start < 5
    spinning = Sandbox(SandboxConfig(cpu_seconds=1, wall_seconds=60))
    assert spinning.run(Program("while True: pass")).status == "died"
    assert time.monotonic() - start < 30


def test_a_gigabyte_of_output_costs_a_bounded_buffer() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    outcome = run("for _ in range(1 << 10): print('x' * (1 << 20))", output=1024)
    assert outcome.status == "output"
    assert len(outcome.output) == 1024
    assert process.memory_info().rss - before < 50 << 20
    flood = "import os\nwhile True:\n for fd in range(3, 64):\n  try: os.write(fd, bytes(65536))\n"
    flood += "  except OSError: pass"
    assert run(flood).status in ("output", "failed")


def test_files_are_bounded() -> None:
    one = "with open('a', 'wb') as f:\n while True: f.write(bytes(1 << 20))"
    assert run(one, files=1 << 22).status in ("failed", "files", "died")
    many = "n = 0\nwhile True:\n n += 1\n with open(str(n), 'wb') as f: f.write(bytes(1 << 16))"
    assert run(many, files=1 << 22).status == "files"


def test_a_program_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        config = SandboxConfig(wall_seconds=600)
        threading.Timer(1.5, lambda: os._exit(0)).start()
        Sandbox(config).run(Program("import time; time.sleep(600)"))
        os._exit(1)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while any(
        "confined.py" in " ".join(p.info["cmdline"] or []) and p.info["ppid"] in (1, child)
        for p in psutil.process_iter(["cmdline", "ppid"])
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_refused_where_the_kernel_cannot_isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Landlock that does not exist: its number of the system call is another."""
    from trainer.post.checkers import sandbox

    script = sandbox._SCRIPT.read_text().replace("= 444, 445, 446", "= 1444, 1445, 1446")
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"v4-test-{os.getpid()}.py"
    folder.write_text(script)
    monkeypatch.setattr(sandbox, "_SCRIPT", folder)
    try:
        with pytest.raises(PostTrainingError, match=r"cannot be isolated on .* has no Landlock"):
            Sandbox(SandboxConfig()).check()
        Sandbox(SandboxConfig(unisolated=True)).check()
    finally:
        folder.unlink()


def test_settings(tmp_path: Path) -> None:
    Sandbox(SandboxConfig()).check()
    Sandbox(SandboxConfig(memory=2**26)).check()
    (tmp_path / "package.py").write_text("value = 3")
    source = f"import sys\nsys.path.append({str(tmp_path)!r})\nimport package"
    assert run(source).error.startswith("ModuleNotFoundError")
    assert run(source, readable=[str(tmp_path)]).status == "finished"
    with pytest.raises(PostTrainingError, match="readable: /no/such is no folder"):
        Sandbox(SandboxConfig(readable=["/no/such"]))
