"""Shards without the work items that failed in every attempt (`data.failed_tasks: quarantine`).

They have a digest of their own, since they hold other text than the complete ones. What was done
for those stays in their unfinished folder, by hard links at no cost (in object storage, by copies
that the storage makes), and the next run that may replace the shards makes them complete from
there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from data.files import fsync_file, write_atomically
from data.manifest import Manifest
from data.prepare.remove import JUDGED_WITHOUT, remove_work_files
from data.prepare.sending import UNFINISHED


def without_items(manifest: Manifest, left_out: dict[str, str]) -> Manifest:
    """The manifest of incomplete shards.

    Arguments:
        left_out: the reason for each work item that is missing, by its name.
    """
    names = sorted(left_out)
    digest = hashlib.sha256(f"{manifest.digest} without {names}".encode()).hexdigest()
    return manifest.model_copy(
        update={
            "digest": digest,
            "folder": digest[:16],
            "complete_digest": manifest.digest,
            "left_out": {name: left_out[name] for name in names},
        }
    )


def incomplete_copy(folder: Path, manifest: Manifest) -> Path:
    """Links what the shards consist of into a folder for them to be published from."""
    copy = folder.with_name(f"{UNFINISHED}{manifest.folder}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, copy_function=_link)
    remove_work_files(copy)
    return copy


def parts_follow_others(folder: Path, left_out: Iterable[str]) -> bool:
    """Whether parts were made with verdicts on other work items; then their records are removed.

    What is a duplicate depends on the work items that the filter pass left out, whose names the
    folder keeps.
    """
    file, names = folder / JUDGED_WITHOUT, json.dumps(sorted(left_out))
    is_other = (file.read_text() if file.exists() else "[]") != names
    if is_other:
        remove_parts(folder)
    write_atomically(file, names)
    return is_other


def _link(file: str, copy: str) -> None:
    try:
        os.link(file, copy)
    except OSError:  # a file system without links
        shutil.copyfile(file, copy)
        fsync_file(Path(copy))


def remove_parts(folder: Path) -> None:
    """Removes the records of parts, so that they are made again; the filter pass stays."""
    for record in folder.glob("*.json"):
        if not record.name.endswith(".filter.json"):
            record.unlink()
