"""A small model on several ranks under random faults, against a run that nothing disturbs.

    python -m benchmarks.soak FOLDER --minutes 120 [--ranks 2] [--steps 400] [--seed 1]

Trains the same run again and again, each time from the beginning: with checkpoints in a folder and
in object storage (an S3 server on loopback) in turn. Every few steps one of the faults of faults.py
comes: ranks, writers or everything are killed or stopped for a while, the disk is full, a folder
read-only, a connection to the storage cut, the clock jumps, a gradient is NaN, the newest
checkpoint is truncated. Every record that any of these runs ever writes must equal that of a run
without faults, to the bit, with its count of tokens; ranks that start again do so from the last
published checkpoint or a later one; and every tensor of the last checkpoint is the same.

Memory and open files of all processes are sampled every second. The soak can be continued: the
same command adds to the same record, with other faults. `table.txt` and `plot.svg` in FOLDER are of
all pieces; they are written after every run of the model, too. The exit code is 1 if anything
differs or a training had to be killed because it stood still.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch
from rich.console import Console

from benchmarks.soak.faults import FAULTS, KILLS, make_writable
from benchmarks.soak.record import Comparison, Lines, Sampler
from benchmarks.soak.summary import fault_table, plot, sentences
from benchmarks.soak.training import Training
from benchmarks.steps.zero_stages import CONFIG, write_data
from tests.s3 import start_server
from trainer.checkpoint import CheckpointReader, folder_name, step_of
from trainer.metrics import Record, read_metrics
from trainer.preflight import code_digest

SPIKES = (
    "{snapshot_every: 5, min_rollback_steps: 1, min_history: 100, threshold: 1e9, "
    "router_collapse_share: 1.0, max_rollbacks: 1000000, skip_bad_batches: false}"
)
SETTINGS = (
    "model.hidden_size=64",
    "model.num_hidden_layers=3",
    "model.layer_types=[window, csa, hca]",
    "model.num_attention_heads=2",
    "model.q_lora_rank=32",
    "model.o_groups=2",
    "model.o_lora_rank=16",
    "model.index_n_heads=2",
    "model.index_topk=8",
    "model.num_hash_layers=1",
    "model.n_routed_experts=8",
    "model.moe_intermediate_size=32",
    "data.seq_len=128",
    "data.global_batch_size=4",
    "data.micro_batch_size=2",
    "optim.learning_rate=3e-4",  # no router collapses, which would be a spike
    "optim.max_skipped_steps=0",  # a NaN gradient is a reason to roll back
    f"stability.spikes={SPIKES}",
    "stability.anticipatory_routing.when=never",
    "checkpoint.every=5",
    "checkpoint.keep=3",
    "checkpoint.mode=async",
    "evaluation.every=50",
    "evaluation.max_rows=4",
    "metrics.layer_stats_every=0",
    "metrics.wandb.mode=disabled",
)
STILL_SECONDS = 240.0
"""Without a step, after which a training is counted as standing still."""
NEXT = (2, 10)
"""Steps between two faults; in one of six cases between the limits of `CALM`."""
CALM = (40, 100)


class Soak:
    """One piece of a soak in `folder`, of at most `minutes`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.ranks, self.steps = options.folder, options.ranks, options.steps
        self.events = Lines(self.folder / "events.jsonl")
        self.samples = Lines(self.folder / "samples.jsonl")
        self.start = time.monotonic()
        self.end = self.start + 60 * options.minutes
        self.number = sum(event["event"] == "begin" for event in self.events.read())
        self.chance = random.Random(f"{options.seed} {self.number}")
        self.sampler = Sampler(self.samples)
        self.arguments = [
            CONFIG,
            *SETTINGS,
            f"steps={self.steps}",
            *_data(self.folder),
            *options.overrides,
        ]
        self.reference: dict[int, Record] = {}

    def run(self) -> int:
        """Trains under faults until the time is over. Returns the exit code."""
        self.reference = self._undisturbed()
        while time.monotonic() < self.end:
            self._round()
            self.summarise(is_over=False)
        self.sampler.stop()
        self.summarise(is_over=True)
        return 1 if any(map(_is_bad, self.events.read())) else 0

    def stop(self) -> None:
        """Ends the piece early: the training saves and stops, table and plot are written."""
        self.end = 0.0

    def _undisturbed(self) -> dict[int, Record]:
        """Trains once without faults; returns its records by step.

        A piece with the code and the settings of the one before takes over that one's run: other
        kernels may round otherwise.
        """
        training = Training(self.folder, "undisturbed", self.arguments, self.ranks)
        made_by = self.folder / "undisturbed.txt"
        key = "\n".join([code_digest(Path.cwd()), *self.arguments])
        is_same = made_by.is_file() and made_by.read_text() == key
        if not (is_same and (training.checkpoints / folder_name(self.steps)).is_dir()):
            shutil.rmtree(training.folder, ignore_errors=True)
            self.sampler.training = training
            with _ended(training):
                training.start()
                while training.code() is None:
                    time.sleep(0.5)
                    path = training.folder / "metrics.jsonl"
                    self.sampler.steps = len(read_metrics(path)) if path.is_file() else 0
            if training.code() != 0:
                raise SystemExit(f"the undisturbed run did not end well; see {training.log}")
            made_by.write_text(key)
        records = read_metrics(training.folder / "metrics.jsonl")
        return {record["step"]: record for record in records}

    def _round(self) -> None:
        """Trains from the first step to the last one under faults, or until the time is over."""
        self.number += 1
        name = f"run-{self.number:03d}"
        self.events.add(event="begin", run=name)
        bucket = f"s3://soak/{name}" if self.number % 2 == 0 else ""
        training = Training(self.folder, name, self.arguments, self.ranks, bucket)
        comparison = Comparison(self.reference, training.folder / "metrics.jsonl")
        self.sampler.training = training
        with _ended(training):
            while time.monotonic() < self.end and not self._is_complete(training):
                if training.code() is not None or training.child is None:
                    self.sampler.steps = 0
                    training.start()
                limits = CALM if self.chance.random() < 1 / 6 else NEXT
                if self._advance(training, comparison, self.chance.randint(*limits)):
                    self._fault(training, comparison)
            if not self._is_complete(training):
                training.terminate()
                assert training.child is not None
                training.child.wait(timeout=120)
        comparison.new_steps()
        complete = self._is_complete(training)
        different = self._different_tensors(training) if complete else []
        self.events.add(
            event="round",
            run=name,
            complete=complete,
            compared=comparison.compared,
            differences=[*comparison.differences, *different],
            tensors=self.tensors if complete else 0,
            different_tensors=len(different),
        )
        if not comparison.differences and not different:
            shutil.rmtree(training.folder)
            training.log.unlink()

    def _is_complete(self, training: Training) -> bool:
        has_ended = training.child is not None and training.code() == 0
        return has_ended and training.newest_step() == self.steps

    def _advance(self, training: Training, comparison: Comparison, steps: int) -> bool:
        """Waits for new steps; False where the training has ended before, or stands still."""
        deadline = time.monotonic() + STILL_SECONDS
        while steps > 0 and time.monotonic() < min(deadline, self.end):
            time.sleep(0.1)
            if new := comparison.new_steps():
                steps -= len(new)
                self.sampler.steps += len(new)
                deadline = time.monotonic() + STILL_SECONDS
            if training.code() is not None:
                return False
        if time.monotonic() >= deadline:
            self._stands_still(training)
            return False
        return steps <= 0

    def _stands_still(self, training: Training) -> None:
        """Records where the processes are, and kills them."""
        position = training.log_size()
        training.dump_stacks()
        text = training.output_since(position)
        self.events.add(event="problem", text=f"{training.folder} stands still: {text}")
        training.kill()

    def _fault(self, training: Training, comparison: Comparison) -> None:
        """Draws a fault, and records what it cost until the next step."""
        names, weights = list(FAULTS), [weight for _, weight in FAULTS.values()]
        name = self.chance.choices(names, weights)[0]
        time.sleep(self.chance.uniform(0.0, 1.0))
        newest, start = training.newest_step(), time.monotonic()
        if name in KILLS:
            self.sampler.steps = 0
        try:
            what = FAULTS[name][0](training, self.chance)
        except psutil.NoSuchProcess:
            return  # it had just ended
        if what is None:
            return
        comparison.new_steps()
        before = comparison.last
        while time.monotonic() < start + STILL_SECONDS:
            if training.code() is not None and not self._is_complete(training):
                training.start()
            if new := comparison.new_steps():
                break
            if self._is_complete(training):
                break
            time.sleep(0.1)
        resumed = new[0] - 1 if new else None
        self.events.add(
            event="fault",
            run=training.folder.name,
            fault=name,
            what=what,
            step=before,
            newest=newest,
            resumed=resumed,
            repeated=max(before - resumed, 0) if resumed is not None else 0,
            seconds=time.monotonic() - start if new else None,
            lost=name in KILLS - {"truncated newest checkpoint"}
            and resumed is not None
            and resumed < newest,
        )

    def _different_tensors(self, training: Training) -> list[str]:
        """Returns the tensors of the last checkpoint that are not those of the undisturbed run."""
        paths = training.published()[-1], self.folder / "undisturbed/checkpoints"
        assert step_of(paths[0]) == self.steps
        ours, theirs = CheckpointReader(paths[0]), CheckpointReader(paths[1] / paths[0].name)
        if ours.shapes != theirs.shapes:
            return ["other tensors"]
        dtypes = dict.fromkeys(ours.shapes, torch.float32)
        left, right = ours.read(dtypes), theirs.read(dtypes)
        self.tensors = len(left)
        return [name for name in left if not torch.equal(left[name], right[name])]

    def summarise(self, is_over: bool) -> None:
        """Writes table and plot; prints them at the end of the piece."""
        if is_over:
            minutes = (time.monotonic() - self.start) / 60
            self.events.add(event="piece", minutes=minutes)
        events, samples = self.events.read(), self.samples.read()
        with (self.folder / "table.txt").open("w") as stream:
            consoles = [Console(file=stream, width=110)] + [Console(width=110)] * is_over
            for console in consoles:
                console.print(fault_table(events))
                for line in sentences(events, samples):
                    console.print(line, highlight=False, soft_wrap=True)
        plot(events, samples, self.folder / "plot.svg")


def _is_bad(event: dict[str, object]) -> bool:
    return bool(event["event"] == "problem" or event.get("differences") or event.get("lost"))


@contextmanager
def _ended(training: Training) -> Iterator[None]:
    """Ends every process of a training, whatever happens."""
    try:
        yield
    finally:
        training.kill()
        if isinstance(training.checkpoints, Path):
            make_writable(training.checkpoints)
        for order in ("clock", "nan"):
            (training.folder.parent / order).unlink(missing_ok=True)


def _data(folder: Path) -> list[str]:
    """Returns the overrides that name the shards, which the first piece prepares."""
    saved = folder / "data.txt"
    if not saved.is_file():
        saved.write_text("\n".join(write_data(folder, [])))
    return saved.read_text().splitlines()


def main() -> int:
    """Runs one piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(start_server()).make_bucket("soak")
        soak = Soak(options)
        signal.signal(signal.SIGTERM, lambda *_: soak.stop())
        return soak.run()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
