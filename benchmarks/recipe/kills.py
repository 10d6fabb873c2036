"""The demo's recipe, killed inside every phase and at every boundary, against an undisturbed run.

    python -m benchmarks.recipe.kills FOLDER [--nproc-per-node 2] [--share 1.0] [key=value ...]

Runs `v4 train configs/recipe-demo.yaml` twice. One run is not disturbed. The other saves a
checkpoint at every boundary and in the middle of every phase, is killed (SIGKILL, all its
processes) as soon as a later step is in its metrics.jsonl, and resumes with the same command. At
the end the losses of all steps, and every tensor of the last checkpoint, must be equal bit for
bit; otherwise the exit code is 1. `v4 demo` prepares the text. `--share 0.2` gives every phase a
fifth of its tokens.

After an interruption of the benchmark itself, the killed run resumes and the other one restarts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from trainer.checkpoint import CheckpointReader, checkpoints_in, step_of
from trainer.config import RunConfig, load_config
from trainer.metrics import Record, read_metrics

CONFIG = "configs/recipe-demo.yaml"
COMPARED = (
    *("tokens", "phase", "loss", "lm_loss", "mtp_loss", "balance_loss", "indexer_loss"),
    *("grad_norm", "learning_rate", "validation_loss"),
)


class Run:
    """`v4 train` in a separate folder, with its output in a file next to it."""

    def __init__(self, folder: Path, name: str, overrides: Sequence[str], processes: int) -> None:
        self.folder, self.log = folder / name, folder / f"{name}.log"
        arguments = [*overrides, f"run_dir={self.folder}", f"--nproc-per-node={processes}"]
        self.command = [sys.executable, "-m", "launch", "train", CONFIG, *arguments]

    def records(self) -> dict[int, Record]:
        """Returns the metrics by step; the last line may be incomplete."""
        path = self.folder / "metrics.jsonl"
        return {r["step"]: r for r in read_metrics(path)} if path.is_file() else {}

    def train(self, *overrides: str, kill_after: int | None = None) -> None:
        """Trains to the end, or until a step after `kill_after` has been written."""
        start = time.time()
        with self.log.open("a") as log:
            child = subprocess.Popen([*self.command, *overrides], stdout=log, stderr=log)
            try:
                while child.poll() is None:
                    time.sleep(0.1)
                    new = (s for s, record in self.records().items() if record["time"] > start)
                    if kill_after is not None and max(new, default=0) > kill_after:
                        return
            finally:
                kill(child)
        if kill_after is not None or child.returncode != 0:
            raise SystemExit(f"{self.folder} ended with {child.returncode}; see {self.log}")


def kill(child: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to the process and its descendants, in whatever session they are."""
    if child.poll() is None:
        parent = psutil.Process(child.pid)
        for process in (parent, *parent.children(recursive=True)):
            process.kill()
    child.wait()


def shortened(share: float) -> list[str]:
    """Returns the phases with a fraction of their tokens, as an override."""
    phases = [s.model_dump(mode="json", exclude_none=True) for s in load_config(CONFIG).phases]
    for phase in phases:
        for field in {"until_tokens", "rampup_tokens"} & phase.keys():
            phase[field] = round(share * phase[field])
    return [f"phases={json.dumps(phases)}"]


def kill_steps(config: RunConfig) -> dict[int, str]:
    """Returns the steps to resume from: the middle of every phase, and every boundary."""
    steps = {}
    phases = config.recipe.phases
    for phase in phases:
        steps[phase.first + phase.steps // 2] = f"inside of phase {phase.number}, {phase.name}"
        steps[phase.end] = f"at the end of phase {phase.number}, {phase.name}"
    del steps[phases[-1].end]
    return steps


def killed_everywhere(run: Run, config: RunConfig) -> None:
    """Trains with a kill after every such step that the run has not reached yet."""
    saved = run.folder / "checkpoints"
    for step, what in kill_steps(config).items():
        if any(step_of(path) >= step for path in checkpoints_in(saved)):
            continue
        run.train(f"checkpoint.every={step}", kill_after=step)
        newest = step_of(checkpoints_in(saved)[-1])
        print(f"killed in step {max(run.records()) + 1}, resumes {what}: step {newest}", flush=True)
        if newest != step:
            raise SystemExit(f"the newest checkpoint should be that of step {step}")
    run.train()


def differences(one: Run, other: Run, steps: int) -> list[str]:
    """Lists the differences between the two runs."""
    ours, theirs = one.records(), other.records()
    assert set(ours) == set(theirs) == set(range(1, steps + 1)), "steps are missing"
    different = [
        f"{name} of step {step}: {ours[step].get(name)} and {theirs[step].get(name)}"
        for step in ours
        for name in COMPARED
        if ours[step].get(name) != theirs[step].get(name)
    ]
    paths = [run.folder / f"checkpoints/step-{steps:08d}" for run in (one, other)]
    readers = [CheckpointReader(path) for path in paths]
    assert readers[0].shapes == readers[1].shapes
    for name in readers[0].shapes:
        tensors = [each.read({name: torch.float32})[name] for each in readers]
        different += [] if torch.equal(*tensors) else [name]
    return different


def main() -> int:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    common = ("metrics.wandb.mode=disabled", "checkpoint.keep=2")
    overrides = [*common, *shortened(options.share), *options.overrides]
    config = load_config(CONFIG, overrides)
    options.folder.mkdir(parents=True, exist_ok=True)
    undisturbed, killed = (
        Run(options.folder, name, overrides, options.nproc_per_node)
        for name in ("undisturbed", "killed")
    )
    print(f"{config.recipe.steps} steps, {len(kill_steps(config))} kills", flush=True)
    start = time.monotonic()
    killed_everywhere(killed, config)
    print(f"the killed run ended after {time.monotonic() - start:.0f} s", flush=True)
    if not (undisturbed.folder / f"checkpoints/step-{config.recipe.steps:08d}").is_dir():
        shutil.rmtree(undisturbed.folder, ignore_errors=True)
        undisturbed.train("checkpoint.every=0")
    different = differences(undisturbed, killed, config.recipe.steps)
    same = f"equal in every step, bit for bit: {', '.join(COMPARED)}; and all tensors at the end"
    print("\n".join(different) or same)
    return 1 if different else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are killed as well
    sys.exit(main())
