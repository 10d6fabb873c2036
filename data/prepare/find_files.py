"""The local files of a source: links are followed, and what cannot be read is an error."""

import glob
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from fsspec.utils import glob_translate

from data.config import SourceConfig
from data.errors import DataError

Identity = tuple[int, int]

# What Spark, macOS, Windows, Python and file systems leave beside data.
_METADATA = (
    *("_SUCCESS", "_metadata", "_common_metadata", "_committed_*", "_started_*"),
    *("__MACOSX", "Thumbs.db", "desktop.ini", "__pycache__", "lost+found"),
)
# Text about a data set, which no JSON or table is.
_DESCRIPTIONS = ("*.md", "README*", "LICENSE*", "dataset_info.json", "dataset_infos.json")


def find_files(source: SourceConfig) -> list[Path]:
    """The local files of a source, sorted; DataError for a path that matches nothing.

    A folder, named or matched by a wildcard, is read with all folders below it, linked ones too. A
    file that several paths or links lead to is there once, under the first of its names. Hidden
    files and those that describe a data set are left out where only a wildcard matches them.
    DataError for a link to nothing and a folder that cannot be read.
    """
    files: set[Path] = set()
    for pattern in source.paths:
        path = Path(pattern)
        is_named = os.path.lexists(path)
        names = [path] if is_named else map(Path, glob.glob(str(path), recursive=True))
        left_out: list[Path] = []
        data = [file for name in names for file in _files_at(name, path, source, left_out)]
        if not data:
            missing = "an empty folder" if is_named else "no such file, folder or match"
            if left_out:
                missing = "hidden files and metadata only"
            raise DataError(f"source {source.name!r}: nothing to read at {pattern} ({missing}).")
        files.update(data)
    by_identity: dict[Identity, Path] = {}
    for file in sorted(files):
        by_identity.setdefault(identity(file), file)
    return list(by_identity.values())


def identity(file: Path) -> Identity:
    """What names of the same file have in common: device and inode. DataError if it is gone."""
    try:
        stat = file.stat()
    except OSError as error:
        if file.is_symlink():
            target = f"a link to {file.readlink()}, which is not there (is its disk mounted?)"
            raise DataError(f"{file} is {target}.") from error
        raise DataError(f"cannot read {file}: {error.strerror}.") from error
    return stat.st_dev, stat.st_ino


def _files_at(
    name: Path, pattern: Path, source: SourceConfig, left_out: list[Path]
) -> Iterator[Path]:
    """The data at `name`, which `pattern` matches; appends what it leaves out to `left_out`."""
    if not _is_data(name, pattern, source):
        left_out.append(name)
        return
    identity(name)
    if name.is_file():
        yield name
    if not name.is_dir():
        return
    included = [(name / i, re.compile(glob_translate(i))) for i in source.include]
    for file in _walk(name, [place for place, _ in included], source, left_out):
        inside = file.relative_to(name).as_posix()
        places = [place for place, expression in included if expression.match(inside)]
        if any(_is_data(file, place, source) for place in places):
            identity(file)
            if file.is_file():
                yield file
        elif places:
            left_out.append(file)


def _walk(
    folder: Path,
    places: list[Path],
    source: SourceConfig,
    left_out: list[Path],
    above: tuple[Identity, ...] = (),
) -> Iterator[Path]:
    """All below a folder that is no folder itself, but what is in the folders `above`, again."""
    here = identity(folder)
    if here in above:
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}.") from error
    for entry in entries:
        if not entry.is_dir():
            yield entry
        elif any(_is_data(entry, place, source) for place in places):
            yield from _walk(entry, places, source, left_out, (*above, here))
        else:
            left_out.append(entry)


def _is_data(file: Path, pattern: Path, source: SourceConfig) -> bool:
    """False for hidden files and metadata, unless `pattern` names them."""
    metadata = _METADATA if source.format == "text" else _METADATA + _DESCRIPTIONS
    for part in set(file.parts).difference(pattern.parts):
        is_hidden = part.startswith(".") and not any(
            named.startswith(".") and fnmatch(part, named) for named in pattern.parts
        )
        if is_hidden or any(fnmatch(part, name) for name in metadata):
            return False
    return True
