"""A test for source files of this project; the environment's may be in the same folder."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = {"benchmarks", "data", "launch", "model", "optim", "tests", "trainer"}


def own_file(name: str) -> Path | None:
    """Returns the path of a file of ours within the project; None for another's.

    Installed, the project is next to torch; in a checkout, torch may be in `.venv` below it.
    """
    file = Path(name)
    if not file.is_relative_to(_ROOT):
        return None
    own = file.relative_to(_ROOT)
    return own if own.parts[0] in _PACKAGES else None
