"""`python -m trainer`, but a single process sleeps before every step: `SECONDS CONFIG ...`.

So another host has the time to come back while one trains alone.
"""

import os
import sys
import time
from typing import Any

from trainer.__main__ import main


def slow_down(seconds: float) -> None:
    """Lets every step of a single process take longer."""
    from trainer.trainer import Trainer

    step = Trainer.step

    def slow_step(self: Trainer, batches: Any) -> Any:
        if os.environ["WORLD_SIZE"] == "1":
            time.sleep(seconds)
        return step(self, batches)

    Trainer.step = slow_step  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
