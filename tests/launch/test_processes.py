"""Exit codes of subprocesses, and the signals that end them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import processes
from trainer.process.exit_codes import describe_signal


def script(code: str) -> list[str]:
    """A command in the form of `processes.command`, of the verb `eval`."""
    return [sys.executable, "-c", f"import os, signal, sys, time; {code}", "eval"]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_exit_codes_pass(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert processes.run(script(f"sys.exit({code})")) == code
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGKILL, "memory ran out"), (signal.SIGBUS, "became shorter"), (signal.SIGSEGV, "")],
)
def test_a_killed_command_names_the_signal(
    number: signal.Signals, cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert processes.run(script(f"os.kill(os.getpid(), {int(number)})")) == 128 + number
    line = capfd.readouterr().err
    assert line.startswith(f"v4: error: v4 eval was killed by {number.name} (signal {number:d})")
    assert cause in line and line.count("\n") == 1


def test_a_command_inside_a_job_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "2")
    code = "import os, sys; sys.exit('WORLD_SIZE' in os.environ or 'RANK' in os.environ)"
    assert processes.run([sys.executable, "-c", code, "eval"]) == 0


def test_ctrl_c_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    code = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    code += "; signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])"
    code += "; os.kill(os.getpid(), signal.SIGINT)"
    assert processes.run(script(code)) == 130
    assert capfd.readouterr().err == "v4: interrupted\n"


def test_a_signal_without_a_name_has_its_number() -> None:
    assert describe_signal(-(signal.SIGRTMIN + 3)) == f"was killed by signal {signal.SIGRTMIN + 3}"


def test_sigterm_ends_the_subprocess_as_well(tmp_path: Path) -> None:
    inner = "open(sys.argv[2], 'w').write(str(os.getpid())); print(flush=True); time.sleep(60)"
    command = [*script(inner), str(tmp_path / "pid")]
    code = f"import sys; from launch import processes; sys.exit(processes.run({command!r}))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe) as outer:
        assert outer.stdout is not None and outer.stdout.readline() == b"\n"
        outer.terminate()
        _, errors = outer.communicate(timeout=30)
    assert outer.returncode == 128 + signal.SIGTERM and b"SIGTERM" in errors
    assert not processes.psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_training_goes_on_when_the_reader_of_its_stderr_has_gone() -> None:
    """What torchrun and its workers write fills no pipe that would then block them."""
    noisy = "import os; [os.write(2, b'\\xff' * 99 + b'\\n') for _ in range(3000)]"
    code = f"""
import sys
from launch import processes
processes.training_command = lambda *arguments: [sys.executable, "-c", {noisy!r}]
sys.exit(processes.train([], 2))
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stderr=writer, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 0


def test_the_workers_of_a_killed_torchrun_are_stopped() -> None:
    code = """
import sys
from launch import processes
command = ["bash", "-c", "sleep 300 & sleep 2; kill -9 $$"]
processes.training_command = lambda *arguments: command
sys.exit(processes.train([], 2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGKILL
    assert "the training process was killed by SIGKILL" in done.stderr


@pytest.mark.parametrize(
    ("numbers", "returncode"),
    [(["SIGUSR1", "SIGUSR2"], 7), (["SIGQUIT"], 137), (["SIGTERM", "SIGUSR2"], 137)],
)
def test_every_signal_reaches_the_training(numbers: list[str], returncode: int) -> None:
    """Which has a session of its own; none may leave it running alone."""
    trainer = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(2), sys.exit(7)))"
    trainer += "; print('ready', flush=True); time.sleep(60)"
    code = f"""
import sys
from launch import processes
processes.training_command = lambda *arguments: [sys.executable, "-c", {trainer!r}]
sys.exit(processes.train([], 1))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        (child,) = processes.psutil.Process(process.pid).children()
        for number in numbers:
            process.send_signal(signal.Signals[number])
            time.sleep(0.5)
        assert process.wait(timeout=30) == returncode
    assert not child.is_running()


@pytest.mark.parametrize(("seconds", "out"), [(30.0, "saved\n"), (0.5, "")])
def test_a_save_may_end_after_a_users_error(seconds: float, out: str) -> None:
    """The training is killed later, where it may be restarted, if it has not ended by then."""
    trainer = "import sys, time; print('v4: error: full', file=sys.stderr, flush=True)"
    trainer += "; time.sleep(2); print('saved', flush=True); sys.exit(2)"
    code = f"""
import sys
from launch import processes
processes._END_SECONDS = {seconds}
processes.training_command = lambda *arguments: [sys.executable, "-c", {trainer!r}]
sys.exit(processes.train([], 1, restarts=3))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, out)
    assert done.stderr.splitlines()[-1] == "v4: error: full"


@pytest.mark.parametrize("start", ["processes.train([], 2)", "torchrun.main(arguments)"])
def test_the_profile_signal_goes_to_the_ranks_that_handle_it(start: str) -> None:
    """The others would be killed by it, and so would torchrun."""
    rank = "trap 'echo profile $RANK; exit 0' USR1; [ $RANK = 1 ] && trap - USR1; echo started; "
    rank += "for i in {1..60}; do sleep 0.1; done"
    code = f"""
import sys
from launch import processes
from trainer.process import torchrun
arguments = ["--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c", {rank!r}]
command = [sys.executable, "-m", "trainer.process.torchrun", *arguments]
processes.training_command = lambda *_: command
sys.exit({start})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "profile 0\n")


@pytest.mark.parametrize("is_nohup", [False, True])
def test_a_hangup_stops_nothing_under_nohup(is_nohup: bool) -> None:
    ignore = (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
        if is_nohup
        else "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    )
    code = f"""
import os, signal
from launch import processes
{ignore}
hangups = []
with processes.handlers(
    dict.fromkeys(processes.STOP_SIGNALS, lambda number, frame: hangups.append(number))
):
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
print(hangups, signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers = [] if is_nohup else [int(signal.SIGHUP)]
    assert done.stdout == f"{[*numbers, int(signal.SIGTERM)]} {is_nohup}\n"


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        ("[ $RANK = 0 ] && sleep 30; kill -9 $BASHPID", 137, "v4: rank 1 on "),
        ("exit 2", 2, ""),
        ("exit 1", 1, "Root Cause"),
    ],
)
def test_torchrun_ends_as_its_first_rank(command: str, code: int, part: str) -> None:
    torchrun = [sys.executable, "-m", "trainer.process.torchrun", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--no-python", "bash", "-c", command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert part in done.stderr and "Traceback" not in done.stderr
    assert ("was killed by SIGKILL (signal 9)" in done.stderr) == (code == 137)


def test_a_users_error_is_not_tried_again() -> None:
    torchrun = [sys.executable, "-m", "trainer.process.torchrun", "--standalone"]
    torchrun += ["--max-restarts=3", "--no-python", "bash", "-c", "echo attempt; exit 2"]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "attempt\n"), done.stderr


@pytest.mark.parametrize("ends", [2, 0])
def test_ranks_that_start_again_are_no_failure(ends: int, tmp_path: Path) -> None:
    """However often, without a restart left; what a failure leaves behind is as ever."""
    rank = f"n=$(ls {tmp_path}/*.$RANK 2>/dev/null | wc -l); touch {tmp_path}/$n.$RANK"
    rank += f"; echo attempt $n; [ $n = 3 ] && exit {ends}; sleep $RANK; exit 75"
    torchrun = [sys.executable, "-m", "trainer.process.torchrun", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--no-python", "bash", "-c", rank]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == ends, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"attempt {n // 2}" for n in range(8)]
    assert "75" not in done.stderr and "SIGTERM" not in done.stderr


@pytest.mark.parametrize(("code", "ends"), [(0, 143), (2, 2)])
def test_a_signal_to_torchrun_waits_for_the_ranks(code: int, ends: int) -> None:
    """A user's error is the same after another start, which 143 would be a reason for."""
    rank = f"trap 'echo saved $RANK; exit {code}' TERM; echo started; while :; do sleep 0.1; done"
    torchrun = [sys.executable, "-m", "trainer.process.torchrun", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--no-python", "bash", "-c", rank]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        torchrun, stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        time.sleep(2.0)  # torchrun learns only after their start whom it has to end
        process.terminate()
        out, error = process.communicate(timeout=60)
    assert (process.returncode, sorted(out.splitlines())) == (ends, ["saved 0", "saved 1"])
    assert "Traceback" not in error
