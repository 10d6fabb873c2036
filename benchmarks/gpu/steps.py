"""A training step on this device with one setting of `kernels`: speed, memory, longest kernels.

Prints a line of JSON (benchmarks/gpu/record.py: StepRecord).

    python -m benchmarks.gpu.steps [--config configs/nano.yaml] [--kernels auto] [--row 4096]
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from benchmarks.gpu.record import KernelTime, StepRecord
from benchmarks.steps.machine import (
    Step,
    ceilings,
    checked_kernels,
    config_of,
    device_of,
    peak_gib,
    restart_peak,
    seconds,
)
from benchmarks.steps.step_gpu import profiled
from model.flops import training_flops
from trainer.config import load_config

LONGEST = 10


def measure(
    name: str, kernels: str, device: torch.device, row: int, micro_tokens: int
) -> StepRecord:
    """Times one microbatch and the update, and profiles one of each."""
    config = config_of(name, device, row, max(micro_tokens // row, 1), [f"kernels={kernels}"])
    step_tokens = load_config(name, []).data.global_batch_size * load_config(name, []).data.seq_len
    limit = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    # What the check did not reach stays eager, as the JSON's table has no later verdicts.
    chosen = checked_kernels(config, device, started=0.0)
    step = Step(config, device, chosen)
    restart_peak(device)
    tokens = config.data.micro_batch_size * row
    passes, update = seconds(step.forward_backward, device), seconds(step.update, device)
    per_token = passes / tokens + update / step_tokens
    longest, launches, busy = profiled(step, passes + update)
    return StepRecord(
        config=os.path.relpath(name),
        row=row,
        micro_tokens=tokens,
        kernels=kernels,
        choices={what: choice.name for what, choice in chosen.by_operation().items()},
        tokens_per_second=1 / per_token,
        mfu=training_flops(config.model, [row]) / row / per_token / limit.flops,
        matmul_flops=limit.flops,
        copied_bytes=limit.bytes,
        peak_gib=peak_gib(device),
        busy=busy,
        launches=launches,
        longest=tuple(
            KernelTime(name=key[:120], calls=calls, milliseconds=ms)
            for key, calls, ms in longest[:LONGEST]
        ),
    )


def main() -> int:
    """Measures, and prints the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=32_768)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    device = device_of(options.device)
    if device is None:
        return 2
    record = measure(options.config, options.kernels, device, options.row, options.micro_tokens)
    print(record.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
