"""Expected errors: each is reported as one sentence without a traceback, with exit code 2."""

import sys
from collections.abc import Callable

from data.errors import DataError
from model.errors import ModelConfigError
from optim.errors import OptimError
from trainer.config import ConfigError
from trainer.exit_codes import USER_ERROR, error_line


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; earlier ones are untouched."""


class DivergedError(ValueError):
    """A run that cannot go on: losses stay non-finite, or spikes cannot be rolled back."""


class ExportError(ValueError):
    """A Hugging Face folder that cannot be written or read."""


class PreflightError(ValueError):
    """Processes that cannot train together, or not on this hardware."""


class OutOfMemoryError(ValueError):
    """A device that is full; the message says which settings would help most."""


class ReportError(ValueError):
    """A run whose metrics cannot be drawn."""


USER_ERRORS: tuple[type[ValueError], ...] = (
    ConfigError,
    ModelConfigError,
    DataError,
    OptimError,
    CheckpointError,
    DivergedError,
    ExportError,
    PreflightError,
    OutOfMemoryError,
    ReportError,
)


def run_or_explain(action: Callable[[], None]) -> int:
    """Runs a command and returns its exit code: 0, or 2 after one line about a user's error."""
    try:
        action()
    except USER_ERRORS as error:
        print(error_line(error), file=sys.stderr, flush=True)
        return USER_ERROR
    return 0
