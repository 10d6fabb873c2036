"""Which run writes into a folder of checkpoints that is not in its run folder.

It is named by `checkpoint.folder`, or by a `checkpoints/` that is a link to a large disk.
"""

from pathlib import Path

from data.files import write_atomically
from data.storage import StoragePath
from trainer.config import CONFIG_FILE, RunConfig
from trainer.config.source import ConfigError, read_yaml_mapping
from trainer.process.errors import CheckpointError

MARKER = "run_dir.txt"


def claim_checkpoints(config: RunConfig) -> None:
    """Writes this run's name into a folder that its checkpoints are in elsewhere.

    Raises CheckpointError where another run's are in the same folder, as after `cp -r`, which
    copies the link and the config: each run would prune and resume the other's checkpoints.
    """
    run_dir, folder = config.run_dir, config.checkpoints
    if config.checkpoint.folder is None:
        assert isinstance(folder, Path)
        if not folder.is_dir() or folder.resolve().is_relative_to(run_dir.resolve()):
            return
    marker = folder / MARKER
    if marker.is_file():
        other = Path(marker.read_text(encoding="utf-8").strip())
        is_ours = other.exists() and other.samefile(run_dir)
        if not is_ours and _has_its_checkpoints_in(config, other):
            raise CheckpointError(_refusal(config, other))
    write_atomically(marker, f"{run_dir.resolve()}\n")


def _has_its_checkpoints_in(config: RunConfig, other: Path) -> bool:
    """Whether the run in `other` has its checkpoints where those of `config` are."""
    if config.checkpoint.folder is None:
        ours, theirs = config.run_dir / "checkpoints", other / "checkpoints"
        return theirs.exists() and ours.samefile(theirs)
    try:
        section = read_yaml_mapping(other / CONFIG_FILE).get("checkpoint")
    except ConfigError:
        return False  # the run is gone
    saved = section.get("folder") if isinstance(section, dict) else None
    return saved == config.with_absolute_paths().checkpoint.folder


def _refusal(config: RunConfig, other: Path) -> str:
    folder = config.checkpoints
    if config.checkpoint.folder is not None:
        return (
            f"checkpoint.folder = {folder} is where {other} keeps its checkpoints; set another for "
            "this run (a copy of that folder resumes from it)"
        )
    assert not isinstance(folder, StoragePath)
    return (
        f"{folder} is a link to {folder.resolve()}, where {other} keeps its checkpoints; copy that "
        "folder and let the link point to the copy"
    )
