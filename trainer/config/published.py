"""Which checkpoints of a folder are published: on a file system, or in object storage. No torch.

A file system has a folder of that name only once it is complete, since it gets the name last. One
that is published again is renamed before the new one gets its name, and counts until then. In
object storage nothing can be renamed: there the manifest, written last, is the publication.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor

from data.storage import AnyPath, StoragePath

MANIFEST_FILE = "manifest.json"
STEPS_FILE = "steps.json"
"""In a folder in object storage: the steps that may be there. The storage's own list may lag behind
what was written a moment ago, which asking for an object by its name does not."""
_NAME = re.compile(r"^step-(\d{8,})$")
_REPLACED = re.compile(r"^\.step-(\d{8,})\.replaced$")


def folder_name(step: int) -> str:
    """Returns the name of a checkpoint's folder: `step-%08d`."""
    return f"step-{step:08d}"


def step_of(checkpoint: AnyPath) -> int:
    """Returns the step in the name of a published checkpoint."""
    return int(checkpoint.name.removesuffix(".replaced").rpartition("-")[2])


def replaced_name(step: int) -> str:
    """Returns the name of a checkpoint's folder while another one takes its place."""
    return f".{folder_name(step)}.replaced"


def published(folder: AnyPath) -> list[AnyPath]:
    """Returns the complete checkpoints, oldest first. Raises OSError where they cannot be listed.

    Nothing is published in a folder that is not there.
    """
    if isinstance(folder, StoragePath):
        paths = mentioned(folder)
        with ThreadPoolExecutor(16) as pool:
            complete = list(pool.map(is_published, paths))
        return [path for path, good in zip(paths, complete, strict=True) if good]
    if not folder.is_dir():
        return []
    paths = list(folder.iterdir())
    steps: dict[int, AnyPath] = {}
    for pattern in (_REPLACED, _NAME):  # the latter count where there are both
        steps |= {int(m[1]): path for path in paths if (m := pattern.match(path.name))}
    return [steps[step] for step in sorted(steps)]


def is_published(checkpoint: AnyPath) -> bool:
    """Whether a checkpoint is complete and was not removed."""
    if isinstance(checkpoint, StoragePath):
        return (checkpoint / MANIFEST_FILE).is_file()
    return checkpoint.is_dir()


def mentioned(folder: StoragePath) -> list[AnyPath]:
    """Returns folders in object storage that may be checkpoints, complete or not, oldest first."""
    names = {*folder.names(), *map(folder_name, read_steps(folder))}
    steps = [(int(m[1]), name) for name in names if (m := _NAME.match(name))]
    return [folder / name for _, name in sorted(steps)]


def read_steps(folder: StoragePath) -> list[int]:
    """Returns the steps in `STEPS_FILE`; none where it is missing or damaged."""
    try:
        steps = json.loads((folder / STEPS_FILE).read_text())["steps"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return [step for step in steps if isinstance(step, int)]


def write_steps(folder: StoragePath, steps: set[int]) -> None:
    """Replaces `STEPS_FILE`."""
    (folder / STEPS_FILE).write(json.dumps({"steps": sorted(steps)}) + "\n")
