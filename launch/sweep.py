"""`v4 sweep`: runs the trials of a sweep on this machine, several at once, without a server."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
from optuna.trial import TrialState

from data.activity import Activity
from data.errors import DataError
from data.files import write_atomically
from data.lease import Lease
from data.manifest import Manifest
from data.processes import find_process
from launch import processes
from launch.sweep_file import Arguments, Sweep, load_sweep
from launch.sweep_progress import SweepDisplay, TrialProgress, failure_reason
from launch.sweep_search import Search, read_history, should_stop, storage_errors
from trainer.config import ConfigError, RunConfig, differences, load_config
from trainer.process.exit_codes import FAILED, error_line

_POLL_SECONDS = 0.3


@dataclass
class Trial:
    """A running trial."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    config: RunConfig
    progress: TrialProgress
    history: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_unfinished(self) -> bool:
        """Whether it has saved checkpoints, and none of its last step: a signal has ended it."""
        is_trained = any((self.folder / "checkpoints").glob("step-*"))
        return is_trained and not self.config.is_complete


def run_sweep(file: str, out: Path | None, jobs: int, seed: int) -> int:
    """Runs, or resumes, every trial of a sweep file; returns the exit code.

    Raises ConfigError before any training for a file that cannot be used.
    """
    sweep = load_sweep(file)
    folder = out or Path("runs", f"sweep-{Path(file).stem}")
    with Lease(folder, "v4 sweep"):
        _check_same(sweep, folder, seed)
        with storage_errors(folder):
            runner = _Runner(sweep, folder, jobs, seed)
            stop = dict.fromkeys(processes.STOP_SIGNALS, runner.on_signal)
            with processes.handlers(stop), runner:
                finished = runner.run()
            failed = runner.search.failed
    if not finished:
        print(f"stopped; the same command resumes {folder}", flush=True)
        return 0
    if failed:
        numbers = ", ".join(map(str, sorted(failed)))
        print(f"failed: trials {numbers}; the same command tries them again", flush=True)
    best = runner.best()
    if best is None:
        message = f"{folder}: every trial failed; see log.txt in their folders"
        print(error_line(message), file=sys.stderr)
        return FAILED
    code = processes.run(processes.command("sweep-report", str(folder)))
    number, value = best
    print(
        f"best: trial {number}, {sweep.metric.name} {value:.4f}: {runner.setting(number)}",
        flush=True,
    )
    return code


def _check_same(sweep: Sweep, folder: Path, seed: int) -> None:
    """Writes the definition into the folder, or checks that it equals the one written before.

    The config of the first trial stands for the config file, whose other values all trials share.
    Raises ConfigError.
    """
    path = folder / "definition.json"
    file, overrides = sweep.config_arguments(next(sweep.samples()))
    config = load_config(file, overrides).to_dict()
    shards = _shards_of(load_config(file, overrides))
    ours = {"seed": seed, **sweep.model_dump(mode="json")}
    try:
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else dict(ours)
        saved_config = saved.pop("config", config)  # not in those before version 0.2
        saved_shards = dict(saved.pop("shards", {})) or shards  # likewise, or not prepared by then
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"{path}: is damaged; choose another folder with --out") from None
    if saved != ours:
        raise ConfigError(
            f"{folder}: holds a sweep with another definition or seed; choose another folder with "
            "--out"
        )
    for key, old, new in differences(saved_config, config):
        if key != "run_dir" and not key.startswith("metrics.wandb."):
            raise ConfigError(
                f"{file}: {key} is {new!r}, and was {old!r} in the trials of {folder}; restore it, "
                "or choose another folder with --out"
            )
    for what, now in shards.items():
        if (then := saved_shards.get(what)) != now:
            raise ConfigError(
                f"{config['data']['shards']}: has another {what} ({now[:16]}…) than when the "
                f"trials of {folder} began ({str(then)[:16]}…); restore it, or choose another "
                "folder with --out"
            )
    record = {**saved, "config": saved_config, "shards": saved_shards}
    write_atomically(path, json.dumps(record, indent=1))


def _shards_of(config: RunConfig) -> dict[str, str]:
    """Returns what identifies the text of all trials; nothing where it is not prepared yet."""
    try:
        manifest = Manifest.load(config.data.shards)
    except DataError:
        return {}
    return {"text": manifest.digest, "tokenizer": manifest.tokenizer_hash}


class _Runner:
    """Keeps up to `jobs` trials running and writes `sweep.json`, which the report reads."""

    def __init__(self, sweep: Sweep, folder: Path, jobs: int, seed: int) -> None:
        self.sweep = sweep
        self.folder = folder
        self.jobs = jobs
        self.search = Search(sweep, folder, seed)
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
        self.display.stop()

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked the sweep to end."""
        return self.signals > 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends the sweep; a handler of signals."""
        self.signals += 1

    def run(self) -> bool:
        """Runs all trials; False after a signal."""
        self._load()
        waiting = self.search.unfinished()
        for number in waiting:
            _stop_orphan(self._trial_folder(number), lambda: self.stopping)
        while not self.stopping:
            while len(self.running) < self.jobs:
                following = waiting.pop(0) if waiting else self.search.next()
                if following is None:
                    break
                self._start(following)
            if not self.running:
                return True
            time.sleep(_POLL_SECONDS)
            for trial in list(self.running):
                self._poll(trial)
            self._show()
        return False

    def _load(self) -> None:
        """Loads the trials of earlier calls."""
        for number in self.search.states():
            self.arguments[number] = self.search.arguments(number)
            every = self._config(self.arguments[number]).metrics.every
            path = self._trial_folder(number) / "metrics.jsonl"
            self.histories[number] = read_history(path, self.sweep.metric.name, every)
        self._record()

    def _config(self, arguments: Arguments) -> RunConfig:
        return load_config(*self.sweep.config_arguments(arguments))

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _start(self, number: int) -> None:
        arguments = self.arguments[number] = self.search.arguments(number)
        folder = self._trial_folder(number)
        folder.mkdir(exist_ok=True)
        command = [*self.sweep.trial_command(arguments), f"run_dir={json.dumps(str(folder))}"]
        if "metrics.wandb.mode" not in arguments:
            command.append("metrics.wandb.mode=disabled")
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=processes.environment(self.jobs),
                start_new_session=True,
            )
        born = psutil.Process(process.pid).create_time()
        record = {"pid": process.pid, "born": born, "folder": str(folder.resolve())}
        write_atomically(folder / "process.json", json.dumps(record))
        config = self._config(arguments).model_copy(update={"run_dir": folder})
        progress = TrialProgress(number, folder, config.recipe.steps)
        self.running.append(Trial(number, folder, process, config, progress))
        self._record()
        self.display.line(f"trial {number} starts: {self.setting(number)}")

    def _poll(self, trial: Trial) -> None:
        """Reads a trial's new points, stops it if early termination says so, records its end."""
        ended = trial.process.poll() is not None
        name = self.sweep.metric.name
        every = trial.config.metrics.every
        trial.history = read_history(trial.folder / "metrics.jsonl", name, every)
        self.histories[trial.number] = trial.history
        rule = self.sweep.early_terminate
        if not ended and rule is not None and not trial.stopped:
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
        self._record()
        self._report(trial, state)

    def _report(self, trial: Trial, state: TrialState) -> None:
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

    def _record(self) -> None:
        """Writes `sweep.json`: the metric and every trial's folder, state and parameters."""
        states, values = self.search.states(), self.search.values()
        trials = [
            {
                "folder": self._trial_folder(number).name,
                "state": states[number],
                "parameters": self.arguments[number],
                "value": values.get(number),
            }
            for number in sorted(self.arguments)
        ]
        record: dict[str, Any] = {
            "metric": self.sweep.metric.name,
            "goal": self.sweep.metric.goal,
            "planned": self.sweep.trials,
            "trials": trials,
        }
        write_atomically(self.folder / "sweep.json", json.dumps(record, indent=1) + "\n")


def end_trials(trials: Sequence[subprocess.Popen[bytes]], signals: Callable[[], int]) -> None:
    """Asks the processes to save and end, and waits for it; kills them after a second signal."""
    for process in trials:
        process.terminate()
    with Activity("waiting for the trials to save; a second signal kills them"):
        for process in trials:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if signals() > 1:
                    process.send_signal(signal.SIGQUIT)  # `v4 train` kills its training then


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _stop_orphan(folder: Path, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Terminates the trial that a killed sweep left running; it saves a checkpoint first.

    `is_stopping` ends the wait for it.

    In the copy of a sweep's folder, the process is the original's and goes on.
    """
    path = folder / "process.json"
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        pid, born = int(known["pid"]), float(known["born"])
        started_in = known.get("folder", str(folder.resolve()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # damaged; the lease on the trial's folder is what keeps two processes apart
    if started_in != str(folder.resolve()):
        return
    process = find_process(pid, born)
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        with Activity(f"waiting for the earlier process {process.pid} of {folder} to save"):
            while not is_stopping():
                with suppress(psutil.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                    return
