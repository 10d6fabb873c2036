"""DeepSpeed's ZeRO stages and the native engine on the debug model: losses, resume, export.

The model of configs/debug.yaml, AdamW on every parameter, fp32, on two processes of one thread,
with part of Python's library as text. The native engine trains twenty steps without interruption;
so does DeepSpeed with ZeRO 0, 1, 2, 3, and 3 with everything offloaded to the host, and each once
more, stopped after ten steps and resumed. The table shows the distance of each from the native
engine in the losses and gradient norms of any step and in the exported weights, and whether the
resumed run is bit-identical. The exit code is 1 if a loss differs by more than 1e-4 or a resume is
not exact.

    python -m benchmarks.steps.zero_stages [--folder FOLDER] [key=value ...]

The folder keeps the runs; key=value changes the config of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.data.corpus import texts
from data.prepare import prepare, train_tokenizer
from trainer.checkpoint import CheckpointReader, folder_name
from trainer.config import load_config
from trainer.export import export_run, read_hf_weights
from trainer.metrics import read_metrics
from trainer.parallel.grid import Grid
from trainer.process.signals import StopRequest
from trainer.state import TrainState
from trainer.step import StepResult
from trainer.trainer import Trainer

CONFIG = "configs/debug.yaml"
STEPS, STOP, LIMIT = 20, 10, 1e-4
TEXT_BYTES = 2_000_000
SETTINGS = (
    f"steps={STEPS}",
    "optim.matrix_optimizer=adamw",
    # With Muon's rate, or an eps so small that rounding errors move weights as far as any other
    # gradient, the last bits of a sum in another order are 1e-3 of the loss after twelve steps.
    "optim.learning_rate=1e-3",
    "optim.adamw.eps=1e-6",
    "data.seq_len=256",
    "data.global_batch_size=4",
    "data.micro_batch_size=1",  # two microbatches on each process
    "checkpoint.every=0",
    "evaluation.every=0",
    "evaluation.max_rows=8",
    "metrics.every=5",
    "metrics.layer_stats_every=0",
    "metrics.wandb.mode=disabled",
)
NATIVE = "native"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
STAGES: dict[str, dict[str, object]] = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
    "ZeRO 3, both offloads": {"stage": 3, **OFFLOAD},
}


def resumed(name: str) -> str:
    """Returns the name of the run that is stopped halfway."""
    return f"{name}, resumed"


def write_data(folder: Path, settings: Sequence[str]) -> list[str]:
    """Writes corpus, tokenizer and shards; returns the overrides that name them."""
    lines, size = [], 0
    for text in texts([Path(sysconfig.get_path("stdlib"))], {".py"}):
        lines.append(json.dumps({"text": text}, ensure_ascii=False))
        size += len(text.encode())
        if size > TEXT_BYTES:
            break
    path = folder / "code.jsonl"
    path.write_text("\n".join(lines) + "\n")
    sources = json.dumps([{"name": "code", "paths": [str(path)]}])
    overrides = [f"data.sources={sources}", f"data.shards={folder / 'shards'}"]
    overrides.append(f"data.tokenizer.path={folder / 'tokenizer'}")
    config = load_config(CONFIG, [*SETTINGS, *overrides, *settings])
    train_tokenizer(config.data)
    prepare(config.data, progress=False)
    return overrides


def block(zero: Mapping[str, object]) -> list[str]:
    """Returns the overrides that train through DeepSpeed."""
    value = {"optimizer": {"type": "AdamW"}, "zero_optimization": zero}
    return ["engine=deepspeed", f"deepspeed={json.dumps(value)}"]


def train(folder: Path, name: str, settings: Sequence[str], stop_at: int = 0) -> None:
    """Trains in this process and its peer; stops after step `stop_at` if it is not 0."""
    config = load_config(CONFIG, [*SETTINGS, *settings, f"run_dir={folder / name}"])
    grid = Grid.build(config.degrees(dist.get_world_size()), torch.device("cpu"))
    stop = StopRequest()
    trainer = Trainer(config, grid, stop)

    def stop_then(state: TrainState, _: StepResult) -> None:
        if state.step == stop_at - 1:
            stop.request()

    if stop_at and grid.is_first:
        trainer.periodic.append(stop_then)
    trainer.run()


def worker(rank: int, folder: Path, settings: list[str]) -> None:
    """Trains all runs, on one of two processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    train(folder, NATIVE, settings)
    for name, zero in STAGES.items():
        train(folder, name, [*settings, *block(zero)])
    for name, zero in STAGES.items():
        for stop_at in (STOP, 0):
            train(folder, resumed(name), [*settings, *block(zero)], stop_at)
    dist.destroy_process_group()


def column(run: Path, number: str) -> list[float]:
    """Returns a metric of every step."""
    values = [record[number] for record in read_metrics(run / "metrics.jsonl")]
    assert len(values) == STEPS, (run, len(values))
    return values


def max_relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def saved(run: Path) -> dict[str, Tensor]:
    """Returns weights and optimizer state of the last checkpoint."""
    reader = CheckpointReader(run / "checkpoints" / folder_name(STEPS))
    return reader.read(dict.fromkeys(reader.shapes, torch.float32))


def exported(run: Path) -> dict[str, Tensor]:
    """Exports the run and returns the exported weights."""
    export_run(load_config(run / "config.yaml"), run / "hf")
    return read_hf_weights(run / "hf")


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """Returns the largest norm of a tensor's difference over the tensor's, and the name."""
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, tensor in theirs.items():
        norm = torch.linalg.vector_norm(tensor.double())
        difference = torch.linalg.vector_norm(ours[name].double() - tensor.double())
        errors[name] = float(difference / norm) if norm > 0 else float(difference)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def is_same(one: Path, other: Path) -> bool:
    """Returns whether two runs have the same losses, weights and states, bit for bit."""
    if any(column(one, number) != column(other, number) for number in ("loss", "grad_norm")):
        return False
    ours, theirs = saved(one), saved(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def compare(folder: Path) -> tuple[Table, bool]:
    """Returns the table, and whether all losses and resumes are within the limits."""
    table = Table(
        title=f"{CONFIG}, AdamW everywhere, fp32, two processes, {STEPS} steps; largest relative "
        "differences from the native engine"
    )
    for name in (
        "",
        "loss",
        "gradient norm",
        "exported weights",
        "worst tensor",
        "resumed after 10",
    ):
        table.add_column(name, justify="left" if name in ("", "worst tensor") else "right")
    native, good = folder / NATIVE, True
    weights = exported(native)
    for name in STAGES:
        loss, norm = (
            max_relative_difference(column(folder / name, number), column(native, number))
            for number in ("loss", "grad_norm")
        )
        error, worst = apart(exported(folder / name), weights)
        same = is_same(folder / name, folder / resumed(name))
        good = good and same and loss <= LIMIT
        resume = "bit-identical" if same else "DIFFERS"
        table.add_row(name, f"{loss:.1e}", f"{norm:.1e}", f"{error:.1e}", worst, resume)
    return table, good


def main() -> int:
    """Trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a new folder that keeps the runs")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        settings = [*write_data(folder, options.settings), *options.settings]
        mp.spawn(worker, (folder, settings), nprocs=2)
        table, good = compare(folder)
    Console(width=140).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
