"""The demo's recipe with other degrees in each phase, killed at every border, against one set.

    python -m benchmarks.recipe.degrees FOLDER [--share 1.0] [key=value ...]

Runs `v4 train configs/recipe-demo.yaml` on four processes, twice: on two tensor and two data ranks
throughout, and with degrees of its own in every phase. The second run is killed (SIGKILL, all its
processes) three times at every border: once the step before it is in metrics.jsonl, once its save
has begun, and once its checkpoint is there. Prints the largest difference of any loss of any step,
or of a part of it, over the loss; the exit code is 1 where it exceeds 1e-5. A third run, with two
context ranks throughout, shows how far apart two sets of degrees are without a border. `v4 demo`
prepares the text. `--share 0.2` gives every phase a fifth of its tokens.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipe.kills import CONFIG, Run, kill, shortened
from trainer.checkpoint import checkpoints_in, folder_name, step_of
from trainer.config import RunConfig, load_config

PROCESSES = 4
LIMIT = 1e-5
DEGREES = (
    {"expert": 4},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2, "context": 2},
    {"tensor": 2, "context": 2, "expert": 4},
    {"context": 4, "expert_tensor": 2},
)
"""Of the phases in their order."""
LOSSES = ("loss", "lm_loss", "mtp_loss", "balance_loss", "indexer_loss")


def with_degrees(phases: str) -> str:
    """Returns the override of the phases with degrees of their own."""
    values = json.loads(phases.removeprefix("phases="))
    own = [value | {"parallel": of} for value, of in zip(values, DEGREES, strict=True)]
    return f"phases={json.dumps(own)}"


def train_until(run: Run, path: Path | None = None, step: int = 0) -> None:
    """Trains until `path` exists or `step` is in the metrics, and kills all processes then."""
    with run.log.open("a") as log:
        child = subprocess.Popen(run.command, stdout=log, stderr=log)
        try:
            while child.poll() is None:
                time.sleep(0.002 if path else 0.02)
                if path.exists() if path else max(run.records(), default=0) >= step:
                    return
        finally:
            kill(child)
    raise SystemExit(f"{run.folder} ended with {child.returncode}; see {run.log}")


def killed_at_borders(run: Run, config: RunConfig) -> None:
    """Trains with three kills at every border."""
    saved = run.folder / "checkpoints"
    for segment in config.recipe.segments[:-1]:
        name = folder_name(segment.end)
        if any(step_of(path) >= segment.end for path in checkpoints_in(saved)):
            continue  # this benchmark was interrupted
        for what, arguments in (
            ("before the save", (None, segment.end - 1)),
            ("in the save", (saved / f".{name}.tmp", 0)),
            ("after the save", (saved / name, 0)),
        ):
            train_until(run, *arguments)
            there = (saved / name).is_dir()
            print(
                f"step {segment.end}: killed {what}; its checkpoint is there: {there}", flush=True
            )
    run.train()


def largest_difference(one: Run, other: Run) -> tuple[float, str]:
    """Returns the largest difference of a loss or a part of it, over the loss, and where it is."""
    ours, theirs = one.records(), other.records()
    assert set(ours) == set(theirs), "steps are missing"
    differences = [
        (abs(ours[step][name] - loss) / ours[step]["loss"], f"{name} of step {step}")
        for step in ours
        for name in LOSSES
        if (loss := theirs[step][name]) is not None
    ]
    return max(differences)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all runs and compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    (phases,) = shortened(options.share)
    common = ["metrics.wandb.mode=disabled", "checkpoint.keep=2", *options.overrides]
    options.folder.mkdir(parents=True, exist_ok=True)
    own_phases = with_degrees(phases)
    one, other, own = (
        Run(options.folder, name, [*common, *settings], PROCESSES)
        for name, settings in (
            ("one_set", [phases, "parallel.tensor=2"]),
            ("other_set", [phases, "parallel.context=2"]),
            ("own_degrees", [own_phases]),
        )
    )
    start = time.monotonic()
    killed_at_borders(own, load_config(CONFIG, [*common, own_phases]))
    print(f"the run with degrees of its own took {time.monotonic() - start:.0f} s", flush=True)
    one.train()
    other.train()
    size, where = largest_difference(one, own)
    print(f"own degrees and one set: largest difference {size:.1e} of the loss, {where}")
    print(
        "two sets without a border: {:.1e} of the loss, {}".format(*largest_difference(one, other))
    )
    return 1 if size > LIMIT else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are killed as well
    sys.exit(main())
