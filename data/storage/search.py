"""Objects that a URL names or matches, with what identifies their content."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from data.storage.path import StoragePath, plain_name
from data.storage.web import ranged_facts

# Names by which drivers call what identifies an object's content, or when it was written.
_VERSIONS = (
    *("ETag", "etag", "blob_id", "md5Hash", "generation"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)


class StoredObject(NamedTuple):
    """An object: its place, its size in bytes, and what its storage changes with the content."""

    path: StoragePath
    size: int
    version: str


def describe(path: StoragePath) -> StoredObject:
    """Returns an object's size and version. Raises FileNotFoundError.

    Raises OSError for one on a web server that does not read parts of it.
    """
    facts: dict[str, Any] | None
    if _is_on_web(path):
        facts = path.attempt(lambda driver: ranged_facts(driver, path.url))
    else:
        is_on_hub = path.url.startswith("hf://")  # whose driver has a cache, without hashes
        facts = path.info(**({"refresh": True, "expand_info": True} if is_on_hub else {}))
    if facts is None:
        raise FileNotFoundError(errno.ENOENT, "does not exist", path.url)
    return StoredObject(path, int(facts["size"]), _version(facts))


def match(pattern: StoragePath) -> list[StoredObject | StoragePath]:
    """Returns an object or a folder by its name, or those that fit the wildcards of a pattern.

    They are `*`, `**` and `[ab]`. Web servers have no list of names: there the URL is an object's.
    """
    pattern.attempt(lambda driver: driver.invalidate_cache())
    if _is_on_web(pattern) or pattern.info() is not None:
        return [describe(pattern)]
    if "*" not in pattern.url and "[" not in pattern.url:
        return [pattern]
    facts = _search(pattern, lambda driver: driver.glob(pattern.url, detail=True))
    return [
        _object(pattern, name, one) if one["type"] == "file" else _place(pattern, name)
        for name, one in facts.items()
    ]


def objects_below(folder: StoragePath) -> list[StoredObject]:
    """Returns all objects in a folder and the folders below it."""
    facts = _search(folder, lambda driver: driver.find(folder.url, detail=True))
    return [_object(folder, name, one) for name, one in facts.items()]


def _is_on_web(path: StoragePath) -> bool:
    return path.url.startswith(("http://", "https://"))


def _search(path: StoragePath, search: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Returns what a driver finds by name. Raises FileNotFoundError where the bucket is absent."""
    try:
        facts = path.attempt(search)
    except FileNotFoundError as error:
        path.require_bucket(error)
        facts = {}
    if not facts:
        path.check_bucket()
    return facts


def _place(path: StoragePath, name: str) -> StoragePath:
    """Returns the place that the driver of `path` calls by a name."""
    return StoragePath(f"{path.url.split('://', 1)[0]}://{plain_name(name)}")


def _object(path: StoragePath, name: str, facts: dict[str, Any]) -> StoredObject:
    return StoredObject(_place(path, name), int(facts["size"]), _version(facts))


def _version(facts: dict[str, Any]) -> str:
    by_name = {name.lower(): value for name, value in facts.items() if value}
    versions = (by_name.get(name.lower()) for name in _VERSIONS)
    return next((str(version) for version in versions if version), "")
