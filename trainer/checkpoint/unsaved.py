"""Distinguishes a run that never had a checkpoint from one whose checkpoints are gone.

`newest_checkpoint.txt` in the run folder names the newest one that was published and not removed
since; it is empty before the first one.
"""

from contextlib import suppress
from typing import Any

from data.errors import DataError
from data.files import read_step_records, write_atomically
from data.storage import AnyPath, StoragePath
from trainer.config import RunConfig
from trainer.config.published import mentioned
from trainer.process.errors import CheckpointError

NEWEST_FILE = "newest_checkpoint.txt"


def record_newest(config: RunConfig, checkpoint: AnyPath | None) -> None:
    """Records the newest checkpoint, None for none yet; on a full disk the old record stays."""
    text = "" if checkpoint is None else f"{checkpoint}\n"
    with suppress(OSError, DataError):
        write_atomically(config.run_dir / NEWEST_FILE, text)


def unsaved_progress(config: RunConfig) -> int:
    """Returns the last step in metrics.jsonl of a run without checkpoints, 0 for a new run.

    Raises CheckpointError where a checkpoint was saved by then: it is gone, and the run would
    silently start again.
    """
    path, checkpoints = config.run_dir / "metrics.jsonl", config.checkpoints
    records = read_step_records(path)[0] if path.is_file() else []
    last: int = max((record["step"] for record in records), default=0)
    try:
        newest = (config.run_dir / NEWEST_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        has_saved = _has_saved(config, last, records)
    else:
        has_saved = bool(last and newest)
    if has_saved:
        raise CheckpointError(
            f"{path} has steps up to {last}, and there is no checkpoint in {checkpoints}: restore "
            "them (is their disk mounted?), name another run_dir, or move metrics.jsonl away to "
            "start from step 0"
        )
    return last


def _has_saved(config: RunConfig, last: int, records: list[dict[str, Any]]) -> bool:
    """Whether a run of an earlier version, without `NEWEST_FILE`, must have had a checkpoint.

    Those that failed are counted in metrics.jsonl, and the one that was being written when the run
    was killed has left its temporary folder.
    """
    steps = config.recipe.segments[0].end
    first_save = min(config.checkpoint.every or steps, steps)
    failed = max((record.get("failed_saves", 0) for record in records), default=0)
    return last // first_save > failed + _has_unfinished(config.checkpoints)


def _has_unfinished(checkpoints: AnyPath) -> bool:
    """Whether a killed save left files."""
    if isinstance(checkpoints, StoragePath):
        return bool(mentioned(checkpoints))
    return any(checkpoints.glob(".step-*"))
