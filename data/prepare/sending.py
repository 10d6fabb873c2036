"""Parts on their way to object storage, each sent by the task that made it.

An object cannot be renamed, so a part gets its final place at once, where no reader sees it: the
manifest, written last, names the folder. What is needed only until then, the counts of ids, waits
in a folder `.unfinished-DIGEST` beside it, which marks the shards as unfinished. The record of a
part is sent last. So a preparation whose local disk is lost resumes with the parts that were sent.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.errors import DataError
from data.indexed import file_sizes
from data.manifest import Manifest, Shard
from data.storage import StoragePath

UNFINISHED = ".unfinished-"
COUNTS = ".counts.npz"
_AT_ONCE = 16
_RECORDS = (".json", ".quarantine.jsonl")
_SENT_BY_TASKS = (*_RECORDS, ".bin", ".idx", COUNTS)


def target_of(root: StoragePath, folder: Path) -> StoragePath:
    """The place of the shards that are prepared in `folder`."""
    return root / folder.name.removeprefix(UNFINISHED)


def send_part(
    root: StoragePath, folder: Path, name: str, shards: Iterable[Shard], record: str
) -> None:
    """Sends the files of a part, then its record, and removes the local shards."""
    target = target_of(root, folder)
    (root / folder.name / f"{name}{COUNTS}").upload(folder / f"{name}{COUNTS}")
    files = [folder / f"{shard.name}{end}" for shard in shards for end in (".bin", ".idx")]
    quarantine = folder / f"{name}.quarantine.jsonl"
    for file in [*files, *([quarantine] if quarantine.exists() else [])]:
        (target / file.name).upload(file)
    (target / f"{name}.json").write(record)
    for file in files:
        file.unlink()


def restore_records(root: StoragePath, folder: Path, names: Iterable[str]) -> None:
    """Fetches the records and counts of the parts `names` that were sent and are not here."""
    records, counts = target_of(root, folder), root / folder.name
    sent, counted = records.sizes(), counts.sizes()

    def fetch(name: str) -> None:
        (counts / f"{name}{COUNTS}").download(folder / f"{name}{COUNTS}")
        (records / f"{name}.json").download(folder / f"{name}.json")

    wanted = [
        name
        for name in names
        if f"{name}.json" in sent
        and f"{name}{COUNTS}" in counted
        and not (folder / f"{name}.json").exists()
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, wanted))


class SentFiles:
    """The objects in the place of the shards, listed once."""

    def __init__(self, root: StoragePath, folder: Path) -> None:
        self.target = target_of(root, folder)
        self._sizes = self.target.sizes()

    def missing(self, shards: Iterable[Shard], vocab_size: int) -> str | None:
        """The name of a file that is not there, or has another size; None where all are there."""
        for shard in shards:
            for name, size in file_sizes(shard.name, shard.documents, shard.tokens, vocab_size):
                if self._sizes.get(name) != size:
                    return name
        return None

    def require(self, shards: Iterable[Shard], vocab_size: int) -> None:
        """Raises DataError where a file of the shards is missing."""
        if (name := self.missing(shards, vocab_size)) is not None:
            raise DataError(f"{self.target}/{name} was removed meanwhile; run the command again.")


def send_rest(target: StoragePath, folder: Path) -> None:
    """Sends the files that are made once all parts are complete."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith(_SENT_BY_TASKS):
            (target / file.name).upload(file)


def copy_parts(root: StoragePath, folder: Path, manifest: Manifest) -> None:
    """Copies the parts of incomplete shards, within the storage, to where their manifest says."""
    source, names = target_of(root, folder), shard_names(manifest)

    def copy(name: str) -> None:
        (source / name).copy_to(root / manifest.folder / name)

    records = [name for name in source.sizes() if name.endswith(_RECORDS)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, [*names, *records]))


def shard_names(manifest: Manifest) -> list[str]:
    """The names of all `.bin` and `.idx` files."""
    return [f"{shard.name}{end}" for shard in manifest.shards for end in (".bin", ".idx")]


def discard(root: StoragePath, folder: Path) -> None:
    """Removes what was sent of a preparation that cannot be finished."""
    target_of(root, folder).remove_tree()
    (root / folder.name).remove_tree()
