"""`v4 sweep`: runs the trials of a sweep on this machine, several at once, without a server."""

import json
import secrets
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from optuna.trial import TrialState

from data.files import write_atomically
from data.lease import Lease
from launch import processes
from launch.sweep_definition import prepare_folder
from launch.sweep_file import Arguments, Sweep, load_sweep
from launch.sweep_progress import SweepDisplay, TrialProgress, failure_reason
from launch.sweep_search import Search, read_history, should_stop
from launch.sweep_trial import (
    POLL_SECONDS,
    Trial,
    end_trials,
    start_process,
    stop_orphan,
    take_lease,
)
from launch.trial import own_folders
from trainer.config import RunConfig, load_config
from trainer.process.exit_codes import FAILED, error_line


def sweep_folder(file: str, out: Path | None) -> Path:
    """Returns the folder of a sweep's trials."""
    return out or Path("runs", f"sweep-{Path(file).stem}")


def run_sweep(file: str, out: Path | None, jobs: int, seed: int, call: str | None = None) -> int:
    """Runs, or resumes, every trial of a sweep file; returns the exit code.

    Other processes, on any host that shares the folder, may run trials of the same sweep.

    Arguments:
        call: name that all processes of one call share: none of them tries a trial again that
            failed in another one; by default a name of this process.

    Raises ConfigError before any training for a file that cannot be used.
    """
    sweep = load_sweep(file)
    folder = sweep_folder(file, out)
    checkpoints = prepare_folder(sweep, folder, seed)
    search = Search(sweep, folder, seed, call or secrets.token_hex(8))
    runner = _Runner(sweep, folder, jobs, search, checkpoints)
    stop = dict.fromkeys(processes.STOP_SIGNALS, runner.on_signal)
    with processes.handlers(stop), runner:
        finished = runner.run()
    if not finished:
        print(f"stopped; the same command resumes {folder}", flush=True)
        return 0
    if failed := runner.search.failed():
        numbers = ", ".join(map(str, failed))
        print(f"failed: trials {numbers}; the same command tries them again", flush=True)
    if others := runner.search.unfinished():
        numbers = ", ".join(map(str, others))
        print(f"other processes run trials {numbers}; the last one makes the report", flush=True)
        return 0
    return _report(runner)


def _report(runner: "_Runner") -> int:
    """Draws the report of a sweep without unfinished trials; returns the exit code."""
    runner.record()  # another process may have run the last trial, and the best one
    best = runner.best()
    if best is None:
        message = f"{runner.folder}: every trial failed; see log.txt in their folders"
        print(error_line(message), file=sys.stderr)
        return FAILED
    code = processes.run(processes.command("sweep-report", str(runner.folder)))
    number, value = best
    name, setting = runner.sweep.metric.name, runner.setting(number)
    print(f"best: trial {number}, {name} {value:.4f}: {setting}", flush=True)
    return code


class _Runner:
    """Keeps up to `jobs` trials running and writes `sweep.json`, which the report reads.

    Arguments:
        checkpoints: name of the sweep's folder below `checkpoint.folder`, where the config has one.
    """

    def __init__(
        self, sweep: Sweep, folder: Path, jobs: int, search: Search, checkpoints: str
    ) -> None:
        self.sweep = sweep
        self.checkpoints = checkpoints
        self.folder = folder
        self.jobs = jobs
        self.search = search
        self.earlier = search.unfinished()
        self.running: list[Trial] = []
        self.signals = 0
        self.arguments: dict[int, Arguments] = {}
        self.histories: dict[int, list[float]] = {}
        self.display = SweepDisplay(sweep.trials)

    def __enter__(self) -> "_Runner":
        self.display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end_trials([trial.process for trial in self.running], lambda: self.signals)
        for trial in self.running:
            trial.lease.release()
        self.display.stop()

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked the sweep to end."""
        return self.signals > 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends the sweep; a handler of signals."""
        self.signals += 1

    def run(self) -> bool:
        """Runs all trials that no other process has; False after a signal."""
        self._read_trials()
        self.record()
        while not self.stopping:
            while len(self.running) < self.jobs and self._start_next():
                pass
            if not self.running and not self._start_abandoned():
                return not self.stopping
            time.sleep(POLL_SECONDS)
            for trial in list(self.running):
                self._poll(trial)
            self._show()
        return False

    def _start_next(self) -> bool:
        """Starts a trial that an earlier call has left unfinished, or the next one of the study."""
        while self.earlier and not self.stopping:
            number = self.earlier.pop(0)
            # A lease that a process on another host may still renew is looked at in the end.
            if (lease := self._take(number, patient=False)) is not None:
                self._start(number, lease)
                return True
        while not self.stopping and (waiting := self.search.next()) is not None:
            if (lease := self._take(waiting, patient=True)) is not None:
                self._start(waiting, lease)
                return True
        return False

    def _start_abandoned(self) -> bool:
        """Starts an unfinished trial whose process has died; waits until that is certain."""
        for number in self.search.unfinished():
            if (lease := self._take(number, patient=True)) is not None:
                self._start(number, lease)
                return True
        return False

    def _take(self, number: int, patient: bool) -> Lease | None:
        """Takes the lease of a trial that is unfinished; None where another process has it."""
        lease = take_lease(self._trial_folder(number), patient, lambda: self.stopping)
        if lease is None:
            return None
        if number in self.search.unfinished():
            return lease
        lease.release()  # its process has ended it meanwhile
        return None

    def _read_trials(self) -> None:
        """Reads arguments and metrics of the trials that others have run, or are running."""
        own = {trial.number for trial in self.running}
        for number in self.search.states():
            if number in own or (arguments := self.search.arguments(number)) is None:
                continue
            self.arguments[number] = arguments
            every = self._config(arguments).metrics.every
            path = self._trial_folder(number) / "metrics.jsonl"
            self.histories[number] = read_history(path, self.sweep.metric.name, every)

    def _config(self, arguments: Arguments, *overrides: str) -> RunConfig:
        file, of_trial = self.sweep.config_arguments(arguments)
        return load_config(file, [*of_trial, *overrides])

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _start(self, number: int, lease: Lease) -> None:
        folder = self._trial_folder(number)
        stop_orphan(folder, lambda: self.stopping)
        arguments = self.arguments[number] = self.search.begin(number)
        own = own_folders(self._config(arguments), folder, self.checkpoints, folder.name)
        command = [*self.sweep.trial_command(arguments), *own]
        if "metrics.wandb.mode" not in arguments:
            command.append("metrics.wandb.mode=disabled")
        process = start_process(command, folder, self.jobs)
        config = self._config(arguments, *own)
        progress = TrialProgress(number, folder, config.recipe.steps)
        self.running.append(Trial(number, folder, process, config, lease, progress))
        self.record()
        self.display.line(f"trial {number} starts: {self.setting(number)}")

    def _poll(self, trial: Trial) -> None:
        """Reads a trial's new points, stops it if early termination says so, records its end."""
        ended = trial.process.poll() is not None
        name = self.sweep.metric.name
        every = trial.config.metrics.every
        points = len(trial.history)
        trial.history = read_history(trial.folder / "metrics.jsonl", name, every)
        self.histories[trial.number] = trial.history
        rule = self.sweep.early_terminate
        if not ended and rule is not None and not trial.stopped and len(trial.history) > points:
            self._read_trials()
            goal, others = self.sweep.metric.goal, self.histories.values()
            if should_stop(rule, goal, trial.history, others):
                trial.process.terminate()
                trial.stopped = True
        if not ended or self.stopping:
            return
        self.running.remove(trial)
        state = TrialState.COMPLETE if not trial.stopped else TrialState.PRUNED
        was_stopped = not trial.stopped and trial.is_unfinished
        if trial.process.returncode != 0 or not trial.history or was_stopped:
            state = TrialState.FAIL
        self.search.finish(trial.number, trial.history, state)
        trial.lease.release()
        self.record()
        self._log_end(trial, state)

    def _log_end(self, trial: Trial, state: TrialState) -> None:
        name = self.sweep.metric.name
        if state == TrialState.FAIL:
            log = trial.folder / "log.txt"
            end = "failed"
            reason = "it was stopped before its last step"
            if trial.process.returncode != 0 or not trial.is_unfinished:
                reason = failure_reason(trial.process.returncode, log, name)
            result = f"{reason}; see {log}"
        else:
            end = state.name.lower()
            result = f"{name} {trial.history[-1]:.4f}"
        self.display.line(f"trial {trial.number} {end}: {self.setting(trial.number)}: {result}")

    def _show(self) -> None:
        best = self.best()
        self.display.show(
            sum(state != "running" for state in self.search.states().values()),
            [trial.progress for trial in self.running],
            None if best is None else best[1],
        )

    def setting(self, number: int) -> str:
        """Returns a trial's parameters on one line."""
        return " ".join(f"{name}={_short(value)}" for name, value in self.arguments[number].items())

    def best(self) -> tuple[int, float] | None:
        """Returns number and value of the best complete trial."""
        values = self.search.values()
        if not values:
            return None
        pick = min if self.sweep.metric.goal == "minimize" else max
        number = pick(values, key=values.__getitem__)
        return number, values[number]

    def record(self) -> None:
        """Writes `sweep.json`: the metric and every trial's folder, state and parameters.

        Again where another process has changed a trial meanwhile: it may have written before this.
        """
        states = None
        while states != (states := self.search.states()):
            for number in states.keys() - self.arguments.keys():
                if (arguments := self.search.arguments(number)) is not None:
                    self.arguments[number] = arguments
            values = self.search.values()
            trials = [
                {
                    "folder": self._trial_folder(number).name,
                    "state": states[number],
                    "parameters": self.arguments[number],
                    "value": values.get(number),
                }
                for number in sorted(states.keys() & self.arguments.keys())
            ]
            record: dict[str, Any] = {
                "metric": self.sweep.metric.name,
                "goal": self.sweep.metric.goal,
                "planned": self.sweep.trials,
                "trials": trials,
            }
            write_atomically(self.folder / "sweep.json", json.dumps(record, indent=1) + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
