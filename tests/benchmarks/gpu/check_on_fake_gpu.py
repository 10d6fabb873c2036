"""benchmarks.gpu.check in a process that sees a GPU, where every worker answers at once.

Only the processes of `trainer.kernels.check` are replaced; all else is the benchmark's own.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

from benchmarks.gpu import check
from tests.fake_gpu.cuda import cuda_of
from tests.fake_gpu.device import FakeGpu
from trainer.kernels.verdict import Problem, Verdict


def answer(operation: str, problem: Problem, device_index: int, *more: Any) -> Verdict:
    """A verdict with every field, as a worker writes it."""
    return Verdict(
        operation,
        True,
        "triton is 2.00 times as fast as eager",
        "triton",
        {"block": 64},
        {"eager": (1e-3, 2e-3), "triton": (1e-3, float("nan"))},
        {"eager": 0.2, "triton": 0.1},
        {"compile": "its check failed"},
    )


if __name__ == "__main__":
    with (
        cuda_of(FakeGpu(), (9, 0)),
        patch("trainer.kernels.check._check", answer),
        patch("trainer.kernels.gpu.installed_libraries", lambda: []),
    ):
        sys.exit(check.main())
