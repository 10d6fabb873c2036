"""Checks one operation in a process of its own, which may hang or die without harm.

The problem comes as JSON on standard input; the verdict goes as JSON into a file, which appears
whole. Messages of compilers and drivers may go to both standard outputs.

    python -m trainer.kernels.worker --operation NAME --device INDEX --verdict FILE --parent PID \\
        --note FILE [--refused JSON]

The note file has the number of the candidate that is being tried: if this process dies or hangs,
its caller starts another one that refuses this candidate.
It ends with its parent, even if that is killed: a kernel that hangs would keep the GPU busy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from trainer.kernels.check import problem_from_json, write_verdict
from trainer.kernels.examine import Bench, check_operation
from trainer.kernels.fit import device_limits, misfit, record_variants
from trainer.kernels.temporary import advice_on, describe_error
from trainer.kernels.timing import EventClock, l2_bytes
from trainer.kernels.verdict import Problem, Verdict
from trainer.process.parent import end_with


def gpu_bench(index: int, note: Path, refused: Mapping[int, str]) -> Bench:
    """Returns the bench of a GPU, which it makes the current one."""

    def write_note(candidate: int | None, what: str) -> None:
        if candidate is None:
            note.unlink()
        else:
            note.write_text(f"{candidate} {what}")

    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    limits = device_limits(index)
    return Bench(
        device,
        record_variants,
        partial(misfit, limits=limits),
        EventClock(),
        l2_bytes(device),
        note=write_note,
        refused=refused,
    )


def verdict_on_gpu(
    operation: str, problem: Problem, index: int, note: Path, refused: Mapping[int, str]
) -> Verdict:
    """Checks the operation on a GPU; an error ends its check and becomes the reason.

    The GPU may be unusable after an error, and this process may even crash at its end: so the
    verdict is all that is left to do. Raises the error of a candidate, which `note` names.
    """
    if not torch.cuda.is_available():
        return Verdict(operation, False, "torch can use no GPU on this host", "eager")
    try:
        return check_operation(operation, problem, gpu_bench(index, note, refused))
    except Exception as error:
        if note.exists() and advice_on(error) is None:
            raise
        reason = f"its check failed: {describe_error(error)}"
        temporary = advice_on(error) is not None
        return Verdict(operation, False, reason, "eager", is_temporary=temporary)


def main() -> None:
    """Checks the operation on the GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operation", required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--verdict", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id")
    parser.add_argument("--note", type=Path, required=True)
    parser.add_argument("--refused", type=json.loads, default={})
    arguments = parser.parse_args()
    end_with(arguments.parent)
    problem = problem_from_json(sys.stdin.read())
    refused = {int(number): reason for number, reason in arguments.refused.items()}
    where = arguments.device, arguments.note, refused
    try:
        verdict = verdict_on_gpu(arguments.operation, problem, *where)
    except Exception as error:
        print(describe_error(error), flush=True)
        sys.exit(1)
    write_verdict(arguments.verdict, verdict)


if __name__ == "__main__":
    main()
