"""The files of a source: links are followed, and what cannot be read is an error."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import NamedTuple

from fsspec.utils import glob_translate

from data.config import SourceConfig
from data.errors import DataError
from data.storage import AnyPath, StoragePath, StoredObject, as_path, describe, match, objects_below

Identity = tuple[int, int] | str

# What Spark, macOS, Windows, Python and file systems leave beside data.
_METADATA = (
    *("_SUCCESS", "_metadata", "_common_metadata", "_committed_*", "_started_*"),
    *("__MACOSX", "Thumbs.db", "desktop.ini", "__pycache__", "lost+found"),
)
# Text about a data set, which no JSON or table is.
_DESCRIPTIONS = ("*.md", "README*", "LICENSE*", "dataset_info.json", "dataset_infos.json")


class SourceFile(NamedTuple):
    """A file of a source.

    Attributes:
        size: of the file. [bytes]
        version: changes with the content: when a local file was modified, or what a storage says.
    """

    path: AnyPath
    size: int
    version: str


def find_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source, sorted; DataError for a path that matches nothing.

    A folder, named or matched by a wildcard, is read with all folders below it, linked ones too. A
    file that several paths or links lead to is there once, under the first of its names. Hidden
    files and those that describe a data set are left out where only a wildcard matches them.
    DataError for a link to nothing and for what cannot be read.
    """
    files: dict[AnyPath, SourceFile] = {}
    for text in source.paths:
        pattern = as_path(text)
        left_out: list[PurePath] = []
        try:
            if isinstance(pattern, StoragePath):
                data = list(_objects_at(pattern, source, left_out))
            else:
                data = [stored_now(file) for file in _local_files(pattern, source, left_out)]
        except OSError as error:
            raise DataError(
                f"source {source.name!r}: cannot read {error.filename}: {error.strerror}."
            ) from error
        if not data:
            missing = "no such file, folder or match"
            if isinstance(pattern, Path) and os.path.lexists(pattern):
                missing = "an empty folder"
            if left_out:
                missing = "hidden files and metadata only"
            raise DataError(f"source {source.name!r}: nothing to read at {text} ({missing}).")
        files.update((file.path, file) for file in data)
    by_identity: dict[Identity, SourceFile] = {}
    for _, file in sorted(files.items(), key=lambda item: str(item[0])):
        by_identity.setdefault(identity(file.path), file)
    return list(by_identity.values())


def stored_now(file: AnyPath) -> SourceFile:
    """The size and the version of a file now. Raises DataError or OSError if it is gone."""
    if isinstance(file, StoragePath):
        return SourceFile(*describe(file))
    stat = _stat(file)
    return SourceFile(file, stat.st_size, str(stat.st_mtime_ns))


def identity(file: AnyPath) -> Identity:
    """What names of the same file have in common: device and inode, or the URL.

    Raises DataError if a local file is gone.
    """
    if isinstance(file, StoragePath):
        return file.url
    stat = _stat(file)
    return stat.st_dev, stat.st_ino


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        if file.is_symlink():
            target = f"a link to {file.readlink()}, which is not there (is its disk mounted?)"
            raise DataError(f"{file} is {target}.") from error
        raise DataError(f"cannot read {file}: {error.strerror}.") from error


def _objects_at(
    pattern: StoragePath, source: SourceConfig, left_out: list[PurePath]
) -> Iterator[SourceFile]:
    """The data in object storage that `pattern` matches; appends what it leaves out."""
    for one in match(pattern):
        if isinstance(one, StoredObject):
            yield from _data_among([one], [pattern.url], source, left_out)
        else:
            places = [f"{one.url}/{include}" for include in source.include]
            yield from _data_among(objects_below(one), places, source, left_out)


def _data_among(
    objects: Iterable[StoredObject],
    places: list[str],
    source: SourceConfig,
    left_out: list[PurePath],
) -> Iterator[SourceFile]:
    """Those objects that one of `places` matches and that are data."""
    expressions = [(PurePath(place), re.compile(glob_translate(place))) for place in places]
    for one in objects:
        name = PurePath(one.path.url)
        matching = [place for place, expression in expressions if expression.match(one.path.url)]
        if any(_is_data(name, place, source) for place in matching):
            yield SourceFile(*one)
        elif matching:
            left_out.append(name)


def _local_files(pattern: Path, source: SourceConfig, left_out: list[PurePath]) -> Iterator[Path]:
    """The local data that `pattern` matches; appends what it leaves out to `left_out`."""
    is_named = os.path.lexists(pattern)
    names = [pattern] if is_named else map(Path, glob.glob(str(pattern), recursive=True))
    for name in names:
        yield from _files_at(name, pattern, source, left_out)


def _files_at(
    name: Path, pattern: Path, source: SourceConfig, left_out: list[PurePath]
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
    left_out: list[PurePath],
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


def _is_data(file: PurePath, pattern: PurePath, source: SourceConfig) -> bool:
    """False for hidden files and metadata, unless `pattern` names them."""
    metadata = _METADATA if source.format == "text" else _METADATA + _DESCRIPTIONS
    for part in set(file.parts).difference(pattern.parts):
        is_hidden = part.startswith(".") and not any(
            named.startswith(".") and fnmatch(part, named) for named in pattern.parts
        )
        if is_hidden or any(fnmatch(part, name) for name in metadata):
            return False
    return True
