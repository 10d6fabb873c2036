"""Checks the kernels at the sizes of benchmarks/gpu/steps.py, and keeps the verdicts for it.

Prints a line of JSON for each operation (benchmarks/gpu/record.py: CheckRecord).

    python -m benchmarks.gpu.check [--config configs/nano.yaml] [--seconds 150]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial

from benchmarks.steps.machine import config_of, device_of
from data.activity import Activity
from data.lease import Lease
from trainer.kernels import Platform
from trainer.kernels.first_check import check_all, lease_name
from trainer.kernels.problem import problem_of
from trainer.kernels.temporary import use_writable_triton_cache
from trainer.kernels.verdict_file import Key, cache_folder, replace_verdict


def main() -> int:
    """Checks, prints, and writes the verdicts into the user's cache."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=32_768)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, help="operations beyond them stay eager")
    options = parser.parse_args()
    device = device_of(options.device)
    if device is None or device.type == "cpu":
        print("kernels are checked on a GPU only", file=sys.stderr)
        return 2
    config = config_of(options.config, device, options.row, options.micro_tokens // options.row)
    key = Key.of(Platform.of(device), problem_of(config, device))
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    folder = cache_folder(config.run_dir / "kernels")
    use_writable_triton_cache(folder / "triton")
    with (
        Lease(folder, "v4 kernels check", name=lease_name(key)),
        Activity("checking kernels") as activity,
    ):
        keep = partial(replace_verdict, folder, key)
        verdicts = check_all(key, device.index or 0, activity, deadline=deadline, keep=keep)
    for verdict in verdicts:
        print(json.dumps(asdict(verdict)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
