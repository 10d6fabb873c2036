"""What is removed from the folder of a preparation, and when."""

from pathlib import Path

from data.prepare.engines import remove_engine_files
from data.prepare.filter_pass import remove_filter_files

JUDGED_WITHOUT = "judged-without.txt"
"""File with the names of the work items that the verdicts do not know."""


def remove_partial_files(folder: Path) -> None:
    """Removes what processes that died were writing; to be called while none is writing."""
    for partial_file in folder.glob(".*"):
        partial_file.unlink()


def remove_work_files(folder: Path) -> None:
    """Removes what complete shards no longer need: results of the filter pass, logs of tasks."""
    remove_filter_files(folder)
    (folder / JUDGED_WITHOUT).unlink(missing_ok=True)
    remove_engine_files(folder)
