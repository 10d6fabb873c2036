"""TensorBoard's event files, in `tensorboard` of the run folder."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.metrics.flatten import flatten

FOLDER = "tensorboard"
_QUEUE = 100_000  # numbers that wait for a thread to write them, so that training does not


def tensorboard_is_installed() -> bool:
    """Whether the package tensorboard is there; torch only writes its files."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoardLog:
    """Writes records as scalars over the run's steps; what goes wrong there is a warning.

    After a resume, points of steps after `last_step`, which were undone, are hidden.
    """

    def __init__(self, run_dir: Path, last_step: int, log: Callable[[str], None]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # takes long to import

        self.log_line = log
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(
                str(run_dir / FOLDER), purge_step=last_step + 1, max_queue=_QUEUE, flush_secs=30
            )
        except OSError as error:
            self._fail(error)

    def log(self, record: dict[str, Any]) -> None:
        """Adds one step's record."""
        if self._writer is None:
            return
        step = record["step"]
        try:
            for name, value in flatten(record).items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._writer = None
        self.log_line(
            f"warning: tensorboard: {error.strerror or type(error).__name__}; it does not log from "
            "here on"
        )
