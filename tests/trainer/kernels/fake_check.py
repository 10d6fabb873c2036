"""A check of kernels in which every kernel passes, and the GPU that it is about."""

from __future__ import annotations

import time
from collections.abc import Callable

from data.activity import Activity
from trainer.kernels.gpu import Platform
from trainer.kernels.verdict import Problem, Verdict

GPU = Platform("NVIDIA H100 80GB HBM3", "9.0", 132, "580.65", "2.13.0", "13.0", "3.7.1")
QUIET = Activity("checking kernels", visible=False)


class FakeCheck:
    """Stands for the check; counts what it was asked."""

    def __init__(self) -> None:
        self.checked: list[str] = []

    def __call__(
        self,
        problem: Problem,
        device_index: int,
        report: Callable[[str], None],
        *,
        seconds: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[Verdict, ...]:
        time.sleep(0.01)
        self.checked += problem.operations
        passed = [Verdict(name, True, "fast", "triton") for name in problem.operations]
        return tuple(passed)
