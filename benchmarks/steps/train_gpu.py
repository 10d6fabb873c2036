"""Training steps on one GPU compared with transformers: tokens per second, MFU and peak memory.

nano.yaml and a four-layer slice of flash.yaml, on rows from 4096 tokens to the longest that fits.
``ours, step`` is the trainer's step of 524,288 tokens, as in nano.yaml, also in FP8: one
microbatch of up to 32,768 tokens is timed, and the update separately. ``ours`` and
``transformers`` are forward and backward with the same weights on the same row, without MTP, which
transformers does not have. transformers runs with eager attention, the only one that it has for
V4, and each of its implementations of experts; after one did not fit, longer rows are skipped for
it. MFU is `model.flops.training_flops` per second over the bf16 matmul rate measured in the same
run.

    python -m benchmarks.steps.train_gpu [--configs configs/nano.yaml flash-slice] [--rows 4096 ...]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from benchmarks.steps.machine import (
    Ceilings,
    Step,
    ceilings,
    checked_kernels,
    config_of,
    device_of,
    formatted,
    peak_gib,
    random_batch,
    restart_peak,
    seconds,
)
from data.files import write_atomically
from model import V4Model
from model.execution import local_execution
from model.flops import training_flops
from model.kernels.operations import Kernels
from trainer.build import DTYPES
from trainer.config import RunConfig

EXPERTS = ("grouped_mm", "batched_mm", "eager")
ROWS = [4096, 16384, 65536]
STEP_TOKENS = 524_288
MICROBATCH_TOKENS = 32_768


@dataclass
class Result:
    """One line of the table."""

    config: str
    row: int
    what: str
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    note: str = ""


def measured(
    result: Result, time: Callable[[], float], flops: float, limit: Ceilings, device: torch.device
) -> Result:
    """Adds times and memory to the result, or the error that occurred.

    ``time`` returns the seconds of a row, ``flops`` are its FLOPs.
    """
    restart_peak(device)
    try:
        duration = time()
    except (RuntimeError, ValueError, ImportError) as error:
        result.note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:70]}"
    else:
        result.tokens_per_second = result.row / duration
        result.mfu = flops / duration / limit.flops
        result.peak_gib = peak_gib(device)
    gc.collect()
    restart_peak(device)
    return result


def step_time(config: RunConfig, device: torch.device) -> float:
    """Returns the seconds of one row of a step, with its share of the update."""
    step = Step(config, device, checked_kernels(config, device))
    passes = seconds(step.forward_backward, device)
    update = seconds(step.update, device)
    return passes / config.data.micro_batch_size + update * config.data.seq_len / STEP_TOKENS


def plain(config: RunConfig) -> RunConfig:
    """Returns the config without MTP and the balance loss, which transformers does not have."""
    changes = {"num_nextn_predict_layers": 0, "balance_loss_weight": 0.0}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def our_calls(config: RunConfig, device: torch.device) -> Callable[[], object]:
    """Returns forward and backward of our model."""
    model = _model(config, device, checked_kernels(config, device))
    batch = random_batch(config)
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)

    def call() -> None:
        model.zero_grad()
        loss = model(tokens, targets=targets).loss
        assert loss is not None
        loss.backward()

    return call


def their_calls(config: RunConfig, device: torch.device, experts: str) -> Callable[[], object]:
    """Returns forward and backward of transformers' model with the same weights."""
    ours = _model(config, device, Kernels())
    sizes = DeepseekV4Config(**config.model.to_hf())
    sizes._attn_implementation, sizes._experts_implementation = "eager", experts
    with device:
        theirs = DeepseekV4ForCausalLM(sizes).to(DTYPES[config.precision]).train()
    theirs.load_state_dict(ours.hf_state_dict())
    del ours
    batch = random_batch(config)
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)

    def call() -> None:
        theirs.zero_grad()
        logits = theirs(tokens, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()

    return call


def _model(config: RunConfig, device: torch.device, kernels: Kernels) -> V4Model:
    with torch.device("meta"):
        model = V4Model(config.model, DTYPES[config.precision], local_execution(kernels))
    model.to_empty(device=device)
    model.init_weights(seed=1)
    return model


def lines_of(
    name: str, row: int, device: torch.device, limit: Ceilings, skip: set[str]
) -> list[Result]:
    """Measures one config at one row length."""
    full = config_of(name, device, row, max(MICROBATCH_TOKENS // row, 1))
    fp8 = full.model_copy(update={"precision": "fp8"})
    bare = plain(config_of(name, device, row))
    results = []
    for what, config, time in (
        ("ours, step", full, step_time),
        ("ours", bare, lambda *args: seconds(our_calls(*args), device)),
        ("ours, step in FP8", fp8, step_time),
    ):
        flops = training_flops(config.model, [row])
        call = partial(time, config, device)
        results.append(measured(Result(name, row, what), call, flops, limit, device))
    for experts in EXPERTS:
        what = f"transformers, {experts}"
        if what in skip:
            continue
        line = measured(
            Result(name, row, what),
            lambda experts=experts: seconds(their_calls(bare, device, experts), device),
            training_flops(bare.model, [row]),
            limit,
            device,
        )
        if line.tokens_per_second is None:
            skip.add(what)
        results.append(line)
    return results


def table_of(results: list[Result], limit: Ceilings) -> Table:
    """Returns a table with a line for each result."""
    table = Table(title=str(limit))
    for heading in ("config", "row", "what", "tokens/s", "MFU", "peak GiB", "note"):
        table.add_column(heading, justify="left" if heading in ("what", "note") else "right")
    for r in results:
        table.add_row(
            r.config,
            str(r.row),
            r.what,
            formatted(r.tokens_per_second, ",.0f"),
            formatted(r.mfu, ".1%"),
            formatted(r.peak_gib, ".2f"),
            r.note,
        )
    return table


def main() -> int:
    """Measures, prints, and rewrites the JSON after every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--configs", nargs="+", default=["configs/nano.yaml", "flash-slice"])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--longest", action="store_true", help="double the row while it fits")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, default=Path("train.json"))
    arguments = parser.parse_args()
    device = device_of(arguments.device)
    if device is None:
        return 2
    limit = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    results: list[Result] = []
    for name in arguments.configs:
        rows, skip = list(arguments.rows), set[str]()
        while rows:
            row = rows.pop(0)
            new = lines_of(name, row, device, limit, skip)
            results += new
            record = {"ceilings": asdict(limit), "results": [asdict(r) for r in results]}
            write_atomically(arguments.json, json.dumps(record, indent=1))
            longest = config_of(name, device, row).model.max_position_embeddings
            if arguments.longest and not rows and new[1].tokens_per_second and 2 * row <= longest:
                rows.append(2 * row)
    Console(width=140).print(table_of(results, limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
