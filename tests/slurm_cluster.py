"""A real Slurm cluster on this machine: munged, slurmctld and several slurmds in one folder."""

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.distributed import free_port

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
DEVICES = ("/dev/null", "/dev/zero")
"""Files that stand for the GPUs of a node."""
START_SECONDS = 60.0
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=5
MessageTimeout=3
TCPTimeout=1
KillWait=5
ReturnToService=2
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
    "RealMemory=8000 Gres=gpu:{gpus}\n"
)


def missing_program() -> str | None:
    """The first program of Slurm or munge that is not installed here."""
    return next((name for name in PROGRAMS if shutil.which(name, path=_PATH) is None), None)


class SlurmCluster:
    """Daemons that end with this process; nothing of them is outside `folder`.

    Arguments:
        nodes: their names.
        cpus: of each node.
    """

    def __init__(self, folder: Path, nodes: Sequence[str] = NODES, cpus: int = 4) -> None:
        self.folder, self.nodes, self.cpus = folder, nodes, cpus
        self.environment = {
            **os.environ,
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts all daemons and waits until every node is idle."""
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        text = _CONFIG.format(
            folder=self.folder, user=pwd.getpwuid(os.geteuid()).pw_name, controller_port=free_port()
        )
        for name in self.nodes:
            text += _NODE.format(name=name, port=free_port(), cpus=self.cpus, gpus=len(DEVICES))
        (self.folder / "slurm.conf").write_text(text)
        gpus = f"NodeName={','.join(self.nodes)} Name=gpu File={','.join(DEVICES)}\n"
        (self.folder / "gres.conf").write_text(gpus)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        options = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        seed = f"--seed-file={self.folder}/munge.seed"
        self._start("munged", "munged", "--force", "--foreground", seed, *options)
        self._wait((self.folder / "munge.socket").exists)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for name in self.nodes:
            self.start_node(name)
        self._wait(lambda: all(self.node_state(name) == "IDLE" for name in self.nodes))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _wait(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_true():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended: {self.log(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no cluster after {START_SECONDS:.0f} s: {self.logs()}")
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        """Starts the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """The power of a node goes: slurmd and all that it has started there."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait()
        self._kill(self._processes(SLURMD_NODENAME=name))

    def log(self, name: str) -> str:
        """The end of a daemon's output."""
        path = self.folder / f"{name}.out"
        return path.read_text(errors="replace")[-2000:] if path.is_file() else ""

    def logs(self) -> str:
        """The ends of all daemons' output."""
        return "\n".join(f"== {name}\n{self.log(name)}" for name in self.daemons)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a command of Slurm."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def submit(self, script: Path, *options: str) -> int:
        """Submits a job file; returns the job's number."""
        done = self.run("sbatch", "--parsable", *options, script)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int | str) -> dict[str, str]:
        """Fields of a job as `scontrol show job` prints them."""
        return self._fields("job", str(number))

    def node_state(self, name: str) -> str:
        """State of a node, such as IDLE or DOWN."""
        return self._fields("node", name).get("State", "")

    def _fields(self, kind: str, name: str) -> dict[str, str]:
        text = self.run("scontrol", "--oneliner", "show", kind, name).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def stop(self) -> None:
        """Kills all daemons, and every process that any of them has started."""
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait()
        while leftover := list(self._processes()):
            self._kill(leftover)

    @staticmethod
    def _kill(tasks: Iterable[psutil.Process]) -> None:
        """Kills tasks with the slurmstepds that watch them, whose environment is empty."""
        for task in list(tasks):
            with suppress(psutil.NoSuchProcess):
                parent = task.parent()
                task.kill()
                if parent is not None and parent.name() == "slurmstepd":
                    parent.kill()
            psutil.wait_procs([task], timeout=5)

    def _processes(self, **variables: str) -> Iterable[psutil.Process]:
        """Processes with this cluster's configuration in their environment: all that it started."""
        expected = {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_here = expected.items() <= process.environ().items()
                if is_here and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


def hostlist(*nodes: str) -> str:
    """`--nodelist` of sbatch for these nodes."""
    return f"--nodelist={','.join(nodes)}"
