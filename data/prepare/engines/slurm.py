"""Slurm: an array of jobs for the tasks of a stage, by datatrove's job script.

datatrove's own executor is not run: it gives jobs a pickle of itself, counts no attempts and leaves
it to its user to start it again after jobs that died.
"""

import hashlib
import heapq
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

from data.activity import print_line
from data.errors import DataError
from data.prepare.engines.remote import NOBODYS_FAULT, Job, RemoteEngine
from data.prepare.engines.worker import LOGS
from data.prepare.task import Preparation, Task

_JOB_BYTES = 128 << 20  # a minute of tokenising, of which opening the tokenizer takes 3 s
_MAX_JOBS = 1000  # of an array, by Slurm's defaults
_MAX_POLL_SECONDS = 15.0
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}


class SlurmEngine(RemoteEngine):
    """Jobs in the partition of `data.slurm`, at most `data.prepare_workers` at a time."""

    def __init__(self, preparation: Preparation, visible: bool) -> None:
        super().__init__(preparation, visible)
        place = hashlib.sha256(os.fsencode(preparation.folder.absolute())).hexdigest()
        self.name = f"v4-prepare-{place[:12]}"  # by which later runs find what this one left
        self.ids: dict[str, str] = {}
        self.submitted = 0.0
        self.explained: set[str] = set()
        self.handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._cancel()  # jobs of a run that died
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self.handlers[number] = signal.signal(number, _exit)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is not None:
            try:
                self._cancel()
            except DataError as failure:  # the next run cancels them
                print_line(f"v4: jobs named {self.name} may still run: {failure}", sys.stderr)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _submit(self, waiting: deque[Task], running: int) -> Iterable[Job]:
        if not waiting:
            return []
        jobs = [self._job(tasks) for tasks in _divide(waiting, self._workers())]
        waiting.clear()
        script = self.files / f"{jobs[0].name}.sbatch"
        script.write_text(self._script(jobs))
        number = _run("sbatch", "--parsable", str(script)).split(";")[0].strip()
        self.submitted = time.monotonic()
        for index, job in enumerate(jobs):
            self.ids[job.name] = f"{number}_{index}"
        return jobs

    def _workers(self) -> int:
        return self.preparation.config.prepare_workers or 1

    def _script(self, jobs: list[Job]) -> str:
        from datatrove.executor import SlurmPipelineExecutor

        config = self.preparation.config
        slurm = config.slurm
        executor = SlurmPipelineExecutor(
            pipeline=[],
            tasks=len(jobs),
            time=slurm.time,
            partition=slurm.partition,
            cpus_per_task=slurm.cpus_per_job,
            mem_per_cpu_gb=slurm.gigabytes_per_cpu,
            workers=config.prepare_workers or -1,
            job_name=self.name,
            qos=slurm.qos,
            env_command=slurm.setup,
            sbatch_args={"no-requeue": "", **slurm.options},  # what is left is submitted here
            logging_dir=str(self.files),
            slurm_logs_folder=str(self.preparation.folder.absolute() / LOGS),
            requeue=False,
        )
        arguments = {
            name: value
            for name, value in executor.get_sbatch_args(len(jobs)).items()
            if value is not None
        }
        command = [sys.executable, "-m", "data.prepare.engines.slurm_job", self.files.absolute()]
        return executor.get_launch_file_contents(
            arguments,
            f"export RAYON_NUM_THREADS={slurm.cpus_per_job}\n"
            f"exec {shlex.join(map(str, command))} {jobs[0].name}",
        )

    def _wait(self, running: dict[str, Job]) -> dict[str, str]:
        spent = time.monotonic() - self.submitted
        time.sleep(min(_MAX_POLL_SECONDS, 0.5 + spent / 50))
        try:
            states = self._states()
        except DataError as error:  # the controller restarts; the jobs continue meanwhile
            print_line(f"v4: {error}", sys.stderr)
            return {}
        self._explain_waiting([states[i] for i in self.ids.values() if i in states])
        ended = {}
        for name in running:
            state, node = states.get(self.ids[name], ("", ""))
            if not state or state in _ENDED:
                ended[name] = self._describe(name, state or "no longer listed", node)
        return ended

    def _explain_waiting(self, states: list[tuple[str, str]]) -> None:
        """Logs once why no job runs, such as a limit that none can meet."""
        reasons = {reason for state, reason in states if state == "PENDING"}
        reasons -= self.explained | {"(None)", "(Priority)", "(Resources)"}
        if reasons and not any(state == "RUNNING" for state, _ in states):
            print_line(f"v4: the jobs of Slurm wait: {' '.join(sorted(reasons))}", sys.stderr)
            self.explained |= reasons

    def _describe(self, name: str, state: str, node: str) -> str:
        if state == "PREEMPTED":
            return NOBODYS_FAULT
        job = f"job {self.ids[name]} of Slurm"
        if self._report(name).exists():
            return f"{job} ended: {state}"
        return (
            f"{job} ended before it began: {state} {node}; does its node see "
            f"{self.files.absolute()} and {sys.executable}?"
        )

    def _states(self) -> dict[str, tuple[str, str]]:
        """State, and node or reason to wait, of each job that Slurm remembers, by its id."""
        options = ["--me", "--noheader", "--array", "--states=all", f"--name={self.name}"]
        lines = _run("squeue", *options, "--format=%i|%T|%R").splitlines()
        fields = (line.strip().split("|") for line in lines if line.strip())
        return {number: (state, node) for number, state, node in fields}

    def _cancel(self) -> None:
        """Ends all jobs, and waits until none of them can write any more."""
        while any(state not in _ENDED for state, _ in self._states().values()):
            _run("scancel", "--me", f"--name={self.name}")
            time.sleep(0.5)


def _divide(tasks: Iterable[Task], workers: int) -> list[list[Task]]:
    """Lists of about equal size, enough for all workers, and each worth the start of Python."""
    by_size = sorted(tasks, key=lambda task: -task.size)
    size = sum(task.size for task in by_size)
    count = min(len(by_size), _MAX_JOBS, max(workers, size // _JOB_BYTES))
    jobs = [(0, number, list[Task]()) for number in range(count)]
    for task in by_size:
        load, number, job = heapq.heappop(jobs)
        heapq.heappush(jobs, (load + task.size, number, [*job, task]))
    return [job for _, _, job in sorted(jobs, key=lambda entry: entry[1])]


def _run(*command: str) -> str:
    """The output of one of Slurm's commands; DataError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(
            f"data.engine is slurm, and there is no `{command[0]}` on this machine; run the "
            "command on a login node of the cluster, or set another data.engine."
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"`{command[0]}` failed: {lines[-1]}")
    return done.stdout


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
