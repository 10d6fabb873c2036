"""Shards without the work items that failed in every attempt (`data.failed_tasks: quarantine`).

They have a digest of their own, since they hold other text than the complete ones. What was done
for those stays in their unfinished folder, by hard links at no cost (in object storage, by copies
that the storage makes), and the next run that may replace the shards makes them complete from
there.
"""

import hashlib
import os
import shutil
from pathlib import Path

from data.manifest import Manifest
from data.prepare.remove import remove_work_files
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
    shutil.copytree(folder, copy, copy_function=os.link)
    remove_work_files(copy)
    return copy


def remove_parts(folder: Path) -> None:
    """Removes the records of parts, so that they are made again; the filter pass stays."""
    for record in folder.glob("*.json"):
        if not record.name.endswith(".filter.json"):
            record.unlink()
