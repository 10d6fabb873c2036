"""Which run writes into a `checkpoints/` that is a link to a folder elsewhere, on a large disk."""

from pathlib import Path

from data.files import write_atomically
from trainer.process.errors import CheckpointError

MARKER = "run_dir.txt"


def claim_checkpoints(run_dir: Path) -> None:
    """Writes this run's name into a folder that its `checkpoints` links to.

    Raises CheckpointError where another run's `checkpoints` is the same folder, as after `cp -r`,
    which copies the link: each run would prune and resume the other's checkpoints.
    """
    checkpoints = run_dir / "checkpoints"
    if not checkpoints.is_dir() or checkpoints.resolve().is_relative_to(run_dir.resolve()):
        return
    marker = checkpoints / MARKER
    if marker.is_file():
        other = Path(marker.read_text(encoding="utf-8").strip())
        shared = (other / "checkpoints").exists() and checkpoints.samefile(other / "checkpoints")
        if shared and not other.samefile(run_dir):
            raise CheckpointError(
                f"{checkpoints} is a link to {checkpoints.resolve()}, where {other} keeps its "
                "checkpoints; copy that folder and let the link point to the copy"
            )
    write_atomically(marker, f"{run_dir.resolve()}\n")
