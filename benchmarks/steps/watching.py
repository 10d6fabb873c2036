"""What heartbeats and the times of ranks cost: steps with them beside steps without, in one run.

    python -m benchmarks.steps.watching [--pairs 150] [--folder FOLDER] [key=value ...]

Two processes of one thread train a small model on part of Python's library. Of
every two steps one has heartbeats and the measured collectives, and the other has neither, first
one and then the other first. The watchdog's thread runs throughout, and its polls are measured
alone. The table has the median step of both kinds and the median difference of the pairs, once by
the clock and once in CPU time, which other programs disturb less; and the time of the measured
calls themselves. The interval of a median is that of 95%, from the order of the differences alone,
whatever their distribution.

The cost of watching is a fixed time per call, whatever the model's sizes, while the disturbance by
other programs is proportional to the step. So the steps are short, and the share in a longer step
follows from the time and its number of calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.data.corpus import texts
from data.prepare import prepare, train_tokenizer
from trainer.config import load_config
from trainer.parallel.grid import Grid, open_grid
from trainer.parallel.waits import Waits
from trainer.process.failures import FailureWatch
from trainer.process.heartbeat import Heartbeat
from trainer.process.watchdog import POLL_SECONDS, Watchdog
from trainer.trainer import Trainer

CONFIG = "configs/debug.yaml"
WARMUP = 10
TEXT_BYTES = 1_000_000
SETTINGS = (
    *("model.hidden_size=64", "model.num_hidden_layers=2", "model.layer_types=[window,csa]"),
    *("model.num_attention_heads=4", "model.num_hash_layers=1", "model.n_routed_experts=4"),
    *("model.num_nextn_predict_layers=0", "model.hc_mult=2"),
    *("data.seq_len=64", "data.global_batch_size=2", "data.micro_batch_size=1"),
    *("checkpoint.every=0", "evaluation.every=0", "metrics.layer_stats_every=0"),
    *("metrics.wandb.mode=disabled", "metrics.every=1000000"),
)


def turn_off(waits: Waits, heartbeat: Heartbeat) -> None:
    """Replaces what a step calls by calls that do nothing."""
    waits.__dict__.update(number=lambda *_: None, during=lambda _: nullcontext())
    heartbeat.__dict__.update(enter=lambda *_: None, step_ended=lambda _: None)


def turn_on(waits: Waits, heartbeat: Heartbeat) -> None:
    """Undoes `turn_off`."""
    for name in ("number", "during"):
        waits.__dict__.pop(name, None)
    for name in ("enter", "step_ended"):
        heartbeat.__dict__.pop(name, None)


def is_watched(step: int) -> bool:
    """Whether a step, from 0, is one with heartbeats: on, off, off, on, and so forth."""
    return step % 4 in (0, 3)


def train(rank: int, folder: Path, overrides: list[str], results: Any) -> None:
    """One process; the first puts the seconds of its steps and their counts into `results`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    config = load_config(CONFIG, overrides)
    seconds: list[tuple[float, float]] = []  # of each step, by the clock and of the CPU
    with open_grid(torch.device("cpu"), config.degrees) as grid:
        failures, heartbeat = FailureWatch(), Heartbeat()
        failures.connect(grid)
        heartbeat.follow(grid.traffic.waits, 1800.0)
        with Watchdog(config.watchdog, heartbeat, folder / "run", failures) as watchdog:
            trainer = Trainer(config, grid, heartbeat=heartbeat)
            waits = grid.traffic.waits

            begun = [time.process_time()]

            def switch(state: Any, result: Any) -> None:
                begun.append(time.process_time())
                seconds.append((result.seconds, begun[-1] - begun[-2]))
                (turn_on if is_watched(state.step) else turn_off)(waits, heartbeat)

            trainer.periodic.append(switch)
            beats, calls = heartbeat.progress
            trainer.run()
            beats, calls = (b - a for a, b in zip((beats, calls), heartbeat.progress, strict=True))
            turn_on(waits, heartbeat)
            watched = sum(map(is_watched, range(len(seconds))))
            if rank == 0:
                poll = time_of(lambda: watchdog._beat(0.0, 60.0), 200)
                results.put((seconds, beats / watched, calls / 2 / watched, poll, each_of(grid)))
        failures.close()


def time_of(call: Any, times: int) -> float:
    """Returns the mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def each_of(grid: Grid) -> tuple[float, float]:
    """Returns the seconds of a heartbeat and of a measured collective that does nothing."""

    def collective() -> None:
        with grid.world.waiting("all_reduce"):
            pass

    heartbeat = Heartbeat()
    return time_of(lambda: heartbeat.enter("update"), 100_000), time_of(collective, 100_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        overrides = prepared(folder, [f"steps={WARMUP + 2 * options.pairs}", *options.overrides])
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29617")
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(train, (folder, overrides, results), nprocs=2)
        report(*results.get())
    return 0


def prepared(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Makes text, tokenizer and shards where they are missing; returns all overrides."""
    source = folder / "text.jsonl"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        library = Path(sysconfig.get_path("stdlib"))
        size, lines = 0, []
        for text in texts([library], {".py"}):
            lines.append(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size > TEXT_BYTES:
                break
        source.write_text("".join(lines))
    sources = json.dumps([{"name": "code", "paths": [str(source)], "domain": "code"}])
    paths = [f"data.sources={sources}", f"data.shards={folder / 'shards'}"]
    paths += [f"data.tokenizer.path={folder / 'tokenizer'}", f"run_dir={folder / 'run'}"]
    config = load_config(CONFIG, [*SETTINGS, *paths, *overrides])
    if not (folder / "shards").exists():
        train_tokenizer(config.data)
        prepare(config.data, progress=False)
    return [*SETTINGS, *paths, *overrides]


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and both ends of its interval of 95%: values of the sorted sample."""
    ordered = sorted(values)
    middle, width = len(ordered) / 2, 0.98 * len(ordered) ** 0.5
    low, high = max(0, int(middle - width)), min(len(ordered) - 1, int(middle + width))
    return statistics.median(ordered), ordered[low], ordered[high]


def report(
    seconds: list[tuple[float, float]],
    beats: float,
    calls: float,
    poll: float,
    each: tuple[float, float],
) -> None:
    """Prints the table."""
    steps = list(enumerate(seconds))[WARMUP:]
    for number, clock in enumerate(("clock", "CPU time")):
        on = [both[number] for step, both in steps if is_watched(step)]
        off = [both[number] for step, both in steps if not is_watched(step)]
        step = statistics.median(off)
        difference = median_with_interval([a - b for a, b in zip(on, off, strict=True)])
        print(
            f"{clock:9s} a step watched {1e3 * statistics.median(on):8.2f} ms, not watched "
            f"{1e3 * step:8.2f} ms; {len(on)} pairs: median "
            + ", ".join(
                (
                    "{:.0f} us ({:.0f} to {:.0f})".format(*(1e6 * x for x in difference)),
                    "{:.2%} ({:.2%} to {:.2%})".format(*(x / step for x in difference)),
                )
            )
        )
    step = statistics.median(both[1] for _, both in steps)
    direct = beats * each[0] + calls * each[1]
    print(f"a heartbeat           {1e6 * each[0]:8.2f} us, {beats:6.1f} in a step")
    print(f"a measured collective {1e6 * each[1]:8.2f} us, {calls:6.1f} in a step")
    print(f"both together         {1e6 * direct:8.2f} us, {direct / step:.3%} of a step's CPU time")
    print(f"a poll with its beat  {1e6 * poll:8.2f} us, {poll / POLL_SECONDS:.3%} of the time")


if __name__ == "__main__":
    sys.exit(main())
