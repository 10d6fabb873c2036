"""The demo's recipe killed inside every phase and at every border, against an undisturbed run.

    python -m benchmarks.recipe.kills FOLDER [--nproc-per-node 2] [--share 1.0] [key=value ...]

Runs `v4 train configs/recipe-demo.yaml` twice. One run is left alone. The other saves a checkpoint
at every border and in the middle of every phase, is killed (SIGKILL, all its processes) as soon as
a later step stands in its metrics.jsonl, and goes on by the same command. At the end the losses of
all steps, and every tensor of the last checkpoint, must be equal bit for bit; exit code 1 where
they are not. `v4 demo` prepares the text. `--share 0.2` gives every phase a fifth of its tokens.

Cut and started again, it goes on: the killed run from where it is, the other from its start.
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

from trainer.checkpoint.folder import checkpoints_in, step_of
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig, load_config
from trainer.metrics.jsonl import Record, read_metrics

CONFIG = "configs/recipe-demo.yaml"
COMPARED = (
    *("tokens", "phase", "loss", "lm_loss", "mtp_loss", "balance_loss", "indexer_loss"),
    *("grad_norm", "learning_rate", "validation_loss"),
)


class Run:
    """`v4 train` in a separate folder, with its output in a file next to it."""

    def __init__(self, folder: Path, name: str, overrides: Sequence[str], processes: int) -> None:
        self.folder, self.log = folder / name, folder / f"{name}.log"
        words = [*overrides, f"run_dir={self.folder}", f"--nproc-per-node={processes}"]
        self.command = [sys.executable, "-m", "launch.cli", "train", CONFIG, *words]

    def records(self) -> dict[int, Record]:
        """The metrics by step; the last line may still be on its way."""
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
    """SIGKILL to the process and to all that it started, in whatever session they are."""
    if child.poll() is None:
        parent = psutil.Process(child.pid)
        for process in (parent, *parent.children(recursive=True)):
            process.kill()
    child.wait()


def shortened(share: float) -> list[str]:
    """The phases with a share of their tokens, as an override."""
    phases = [s.model_dump(mode="json", exclude_none=True) for s in load_config(CONFIG).phases]
    for phase in phases:
        for field in {"until_tokens", "rampup_tokens"} & phase.keys():
            phase[field] = round(share * phase[field])
    return [f"phases={json.dumps(phases)}"]


def places(config: RunConfig) -> dict[int, str]:
    """Steps after which to go on: the middle of every phase, and every border."""
    found = {}
    phases = config.recipe.phases
    for phase in phases:
        found[phase.first + phase.steps // 2] = f"inside of phase {phase.number}, {phase.name}"
        found[phase.end] = f"at the end of phase {phase.number}, {phase.name}"
    del found[phases[-1].end]
    return found


def killed_everywhere(run: Run, config: RunConfig) -> None:
    """Trains with a kill after every place that the run has not reached yet."""
    saved = run.folder / "checkpoints"
    for step, what in places(config).items():
        if any(step_of(path) >= step for path in checkpoints_in(saved)):
            continue
        run.train(f"checkpoint.every={step}", kill_after=step)
        newest = step_of(checkpoints_in(saved)[-1])
        print(f"killed in step {max(run.records()) + 1}, goes on {what}: step {newest}", flush=True)
        if newest != step:
            raise SystemExit(f"the newest checkpoint should be that of step {step}")
    run.train()


def differences(one: Run, other: Run, steps: int) -> list[str]:
    """What is not the same in the two runs."""
    ours, theirs = one.records(), other.records()
    assert set(ours) == set(theirs) == set(range(1, steps + 1)), "not every step is there"
    found = [
        f"{name} of step {step}: {ours[step].get(name)} and {theirs[step].get(name)}"
        for step in ours
        for name in COMPARED
        if ours[step].get(name) != theirs[step].get(name)
    ]
    paths = [run.folder / f"checkpoints/step-{steps:08d}" for run in (one, other)]
    stored = [CheckpointReader(path) for path in paths]
    assert stored[0].shapes == stored[1].shapes
    for name in stored[0].shapes:
        tensors = [each.read({name: torch.float32})[name] for each in stored]
        found += [] if torch.equal(*tensors) else [name]
    return found


def main() -> int:
    """Read the command line."""
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
    alone, killed = (
        Run(options.folder, name, overrides, options.nproc_per_node) for name in ("alone", "killed")
    )
    print(f"{config.recipe.steps} steps, {len(places(config))} kills", flush=True)
    start = time.monotonic()
    killed_everywhere(killed, config)
    print(f"the killed run is through after {time.monotonic() - start:.0f} s", flush=True)
    if not (alone.folder / f"checkpoints/step-{config.recipe.steps:08d}").is_dir():
        shutil.rmtree(alone.folder, ignore_errors=True)
        alone.train("checkpoint.every=0")
    found = differences(alone, killed, config.recipe.steps)
    same = f"equal in every step, to the bit: {', '.join(COMPARED)}; and all tensors at the end"
    print("\n".join(found) or same)
    return 1 if found else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    sys.exit(main())
