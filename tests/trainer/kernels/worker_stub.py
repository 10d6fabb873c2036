"""Stands for trainer/kernels/worker.py, whose arguments it takes: each operation ends otherwise."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from trainer.kernels.check import problem_from_json, write_verdict
from trainer.kernels.verdict import Verdict


def main() -> None:
    operation, path = sys.argv[2], Path(sys.argv[6])
    problem = problem_from_json(sys.stdin.read())
    assert operation in problem.operations and sys.argv[4] == "3"
    print("a compiler's warning")
    if operation == "attention":
        time.sleep(600)
    if operation == "indexer":
        os.kill(os.getpid(), signal.SIGSEGV)
    if operation == "indexer_loss":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if operation == "compressor":
        sys.exit(0)
    if operation == "permute":
        os.kill(os.getpid(), signal.SIGKILL)
    refused: dict[str, str] = {}
    if operation == "swiglu":  # of its candidates, one crashes and one hangs
        note, refused = Path(sys.argv[10]), json.loads(sys.argv[12])
        for candidate, what in (("1", "compiles"), ("2", "runs")):
            if candidate in refused:
                continue
            note.write_text(f"{candidate} {what}")
            if what == "compiles":
                time.sleep(1.5)  # longer than a run may take
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(600)
    verdict = Verdict(
        operation, True, "fine", "triton", {"block": 64}, {"eager": (0.1, 0.2)}, refused=refused
    )
    write_verdict(path, verdict)


if __name__ == "__main__":
    main()
