"""`python -m trainer` with a fault: `python -m benchmarks.steps.planted HOW RANK CONFIG ...`.

In its fifth step of the first attempt, rank RANK hangs. HOW: `skip` (it leaves out its next
all-reduce), `sleep` (it stays in code of its own), `stop` (its process is stopped), `hold` (it
holds Python's interpreter). With `slow` it hangs nowhere, and from the tenth step on sleeps 30% of
the median of the steps before.
"""

import ctypes
import os
import signal
import statistics
import sys
import time
from operator import sub
from typing import Any

from data.activity import print_line
from trainer.__main__ import main

HANGS_AT = 5
SLOW_FROM = 10
SLOW_SHARE = 0.3


def plant(how: str, rank: int) -> None:
    """Changes the loop of this process, which is rank `rank` or another one."""
    import torch.distributed as dist

    from trainer.engine import NativeEngine

    forward_backward, all_reduce = NativeEngine.forward_backward, dist.all_reduce
    starts: list[float] = []

    def no_all_reduce(*_: Any, **__: Any) -> None:
        dist.all_reduce = all_reduce

    def hang() -> None:
        print_line(f"planted at {time.time():.2f}", sys.stderr)
        if how == "skip":
            dist.all_reduce = no_all_reduce  # type: ignore[assignment]
        elif how == "sleep":
            time.sleep(600)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "hold":
            ctypes.PyDLL(None).sleep(600)

    def changed(self: NativeEngine, *args: Any, **kwargs: Any) -> Any:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        starts.append(time.perf_counter())
        if self.grid.rank == rank and how != "slow" and len(starts) == HANGS_AT and not attempt:
            hang()
        if self.grid.rank == rank and how == "slow" and len(starts) >= SLOW_FROM:
            if len(starts) == SLOW_FROM:
                print_line(f"planted at {time.time():.2f}", sys.stderr)
            time.sleep(SLOW_SHARE * statistics.median(map(sub, starts[1:SLOW_FROM], starts)))
        return forward_backward(self, *args, **kwargs)

    NativeEngine.forward_backward = changed  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
