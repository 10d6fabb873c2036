"""`python -m trainer`, but one rank fails: `python -m tests.launch.failing RANK HOW CONFIG ...`.

HOW is `crash` (an unexpected error in the second step), `mistake` (a user's error there), `away` (a
file server that is away there, at the first attempt) or `early` (an unexpected error before the
checks). The other ranks wait as long as in a collective that never
ends by itself.
"""

import errno
import os
import sys
import time
from typing import Any

from trainer.__main__ import main


def fail(rank: int, how: str) -> None:
    """Let rank `rank` fail, and the others wait."""
    from data.errors import DataError
    from trainer import preflight
    from trainer.trainer import Trainer

    step = Trainer.step

    def failing_step(self: Trainer, batches: Any) -> Any:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if self.state.step == 1 and not (how == "away" and attempt > 0):
            if self.grid.rank != rank:
                time.sleep(300)  # as deaf as inside a collective
            if how == "mistake":
                raise DataError("the shard is damaged.")
            if how == "away":
                raise OSError(errno.ESTALE, "Stale file handle", "a.bin")
            raise RuntimeError("out of luck")
        return step(self, batches)

    def failing_digests(config: Any) -> Any:
        if os.environ["RANK"] == str(rank):
            raise RuntimeError("out of luck")
        return digests(config)

    digests = preflight._digests
    if how == "early":
        preflight._digests = failing_digests
    Trainer.step = failing_step  # type: ignore[method-assign]


if __name__ == "__main__":
    fail(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[3:]))
