"""Two hosts, each a network namespace with its own address: one dies, the run resumes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from launch.processes import RESTART_ENVIRONMENT
from tests.distributed import spawn
from tests.trainer.parallel.topologies import MODEL
from tests.trainer.tiny import assert_same_run, column, steps_in_file, train_jobs

pytestmark = pytest.mark.slow

STEPS = 14
RUN = [f"steps={STEPS}", "checkpoint.every=3", "checkpoint.keep=0"]
HEAD = "10.77.0.1"
PORT = 29500
LIMIT = 150.0  # seconds that a whole job with a death in it may take


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


class Host:
    """A network namespace that shares nothing but the files with the other one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = f"host-{number}"
        self.space = f"v4test{os.getpid()}-{number}"
        self.link = f"v4t{number}"
        self.address = f"10.77.0.{number}"
        self.torchrun: subprocess.Popen[str] | None = None

    def command(self, *training: str, restarts: int, hosts: str) -> list[str]:
        """torchrun as a person would start it on this host; ours where the hosts may change."""
        torchrun = "torch.distributed.run" if hosts == "2" else "trainer.process.torchrun"
        waits = "is_host={head},keep_alive_interval=1,last_call_timeout=2"
        head = "true" if self.address == HEAD else "false"
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return [
            *("ip", "netns", "exec", self.space, *named),
            *(sys.executable, "-m", torchrun),
            *("--nnodes", hosts, "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"{HEAD}:{PORT}", "--rdzv-id", "two"),
            *("--max-restarts", str(restarts)),
            *("--rdzv-conf", waits.format(head=head), "--local-addr", self.address),
            *("-m", *training),
        ]

    def start(self, log: Path, *training: str, restarts: int = 3, hosts: str = "2") -> None:
        """Starts this host's share of the job; its output is appended to `log`."""
        environment = os.environ | RESTART_ENVIRONMENT
        environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.link}
        with log.open("a") as file:
            self.torchrun = subprocess.Popen(
                self.command(*training, restarts=restarts, hosts=hosts),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
            )

    def workers(self) -> list[psutil.Process]:
        """The training processes of this host."""
        assert self.torchrun is not None
        return psutil.Process(self.torchrun.pid).children()

    def kill(self) -> None:
        """The power goes: torchrun and its workers die without a word."""
        if self.torchrun is None or self.torchrun.poll() is not None:
            return
        doomed = [psutil.Process(self.torchrun.pid), *self.workers()]
        for process in doomed:
            process.kill()
        self.torchrun.wait()


def without(why: str) -> NoReturn:
    """Skip where two hosts cannot be made; fail where .ci/run has brought what they need."""
    if os.environ.get("CI"):
        pytest.fail(f"two hosts are needed here, and {why}")
    pytest.skip(f"needs two hosts, and {why}")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts joined by a cable; nothing of them is left afterwards."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            without(f"there is no `{tool}`")
    if os.geteuid() != 0:
        without("only root makes network namespaces")
    pair = [Host(1), Host(2)]
    with ExitStack() as stack:
        for host in pair:
            result = ip("netns", "add", host.space)
            if result.returncode:
                without(f"no network namespace can be made: {result.stderr.strip()}")
            stack.callback(ip, "netns", "del", host.space)
            stack.callback(host.kill)
        one, two = pair
        cable = ["link", "add", one.link, "netns", one.space, "type", "veth"]
        result = ip(*cable, "peer", "name", two.link, "netns", two.space)
        if result.returncode:
            without(f"two network namespaces cannot be joined: {result.stderr.strip()}")
        for host in pair:
            ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", host.link)
            for link in ("lo", host.link):
                assert ip("-n", host.space, "link", "set", link, "up").returncode == 0
        yield pair


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spawn(train_jobs, 2, tiny, folder, [("run", RUN, 0)])
    return folder / "run"


def wait_for_step(run_dir: Path, step: int, hosts: list[Host]) -> None:
    deadline = time.monotonic() + LIMIT
    while not (run_dir / "metrics.jsonl").is_file() or steps_in_file(run_dir)[-1:] < [step]:
        for host in hosts:
            assert host.torchrun is not None and host.torchrun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ends(hosts: list[Host]) -> list[int]:
    """The exit codes of both torchruns."""
    return [host.torchrun.wait(LIMIT) for host in hosts if host.torchrun is not None]


@pytest.mark.parametrize("dies", ["worker", "host"])
def test_a_death_costs_no_more_than_the_steps_since_the_checkpoint(
    tiny: Path, undisturbed: Path, hosts: list[Host], tmp_path: Path, dies: str
) -> None:
    """SIGKILL on one host after step 5; the job restarts from step 3 by itself.

    A dead host is started again by its cluster manager, here by the test; the other host's
    torchrun waits for it.
    """
    run_dir = tmp_path / "run"
    logs = [tmp_path / "log1", tmp_path / "log2"]
    training = ["trainer", str(tiny), *RUN, f"run_dir={run_dir}"]
    for host, log in zip(hosts, logs, strict=True):
        host.start(log, *training)
    try:
        wait_for_step(run_dir, 5, hosts)
        if dies == "worker":
            (worker,) = hosts[1].workers()
            worker.kill()
        else:
            hosts[1].kill()
            hosts[1].start(logs[1], *training)
        assert ends(hosts) == [0, 0]
    except BaseException:
        print(*(log.read_text() for log in logs), sep="\n")
        raise
    assert "resumed from" in (logs[0].read_text() + logs[1].read_text())
    assert steps_in_file(run_dir) == list(range(1, STEPS + 1))
    assert_same_run(undisturbed, run_dir, STEPS)


def test_a_run_goes_on_with_the_hosts_that_are_there(
    tiny: Path, hosts: list[Host], tmp_path: Path
) -> None:
    """One of two dies, the other one goes on alone, and takes it in when it is back.

    The death costs the only restart there is; the return costs none, and no step.
    """
    run_dir, overrides = tmp_path / "run", [*MODEL, f"steps={STEPS}", *RUN[1:]]
    logs = [tmp_path / "log1", tmp_path / "log2"]
    training = ["tests.launch.slowed", "2", str(tiny), *overrides, f"run_dir={run_dir}"]
    for host, log in zip(hosts, logs, strict=True):
        host.start(log, *training, restarts=1, hosts="1:2")
    try:
        wait_for_step(run_dir, 5, hosts)
        hosts[1].kill()
        deadline = time.monotonic() + LIMIT
        while f"step 4/{STEPS}" not in logs[0].read_text().partition("on 1 process;")[2]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        hosts[1].start(logs[1], *training, restarts=1, hosts="1:2")
        assert ends(hosts) == [0, 0]
    except BaseException:
        print(*(log.read_text() for log in logs), sep="\n")
        raise
    log = logs[0].read_text() + logs[1].read_text()
    assert log.count("on 2 processes;") == 2 and log.count("on 1 process;") == 1
    assert log.count("resumed from") == 2 and "stopped after step" in log
    assert steps_in_file(run_dir) == list(range(1, STEPS + 1))
    spawn(train_jobs, 2, tiny, tmp_path, [("undisturbed", overrides, 0)])
    undisturbed = column(tmp_path / "undisturbed", "loss")
    assert column(run_dir, "loss") == pytest.approx(undisturbed, rel=1e-5)


def test_the_first_host_reports_who_failed_on_the_other(
    tiny: Path, hosts: list[Host], tmp_path: Path
) -> None:
    """Rank 0 waits indefinitely; the failure of rank 1 ends it and is in both hosts' logs."""
    logs = [tmp_path / "log1", tmp_path / "log2"]
    training = ["tests.launch.failing", "1", "crash", str(tiny), f"run_dir={tmp_path / 'run'}"]
    for host, log in zip(hosts, logs, strict=True):
        host.start(log, *training, restarts=0)
    assert ends(hosts) == [1, 1]
    sentence = "v4: rank 1 on host-2 failed: RuntimeError: out of luck"
    texts = [log.read_text() for log in logs]
    for text in texts:
        assert text.splitlines().count(sentence) == 1
    assert 'raise RuntimeError("out of luck")' in texts[1].split("ChildFailedError")[0]
    assert 'raise RuntimeError("out of luck")' not in texts[0]
