"""URLs of object storage, as `s3://bucket/folder`. Imports only the standard library."""

import os
import re

_URL = re.compile(r"^([a-z][a-z0-9+.:-]*)://(.*)$", re.DOTALL | re.IGNORECASE)


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text names a place in object storage; a local path, or `file://`, does not."""
    match = _URL.match(os.fspath(text))
    return match is not None and match[1].lower() != "file"


def check_url(text: str) -> str:
    """Returns a path or a URL: of a path with `~` in front, and of `file://`, the local path.

    Raises ValueError, without the text, for a URL with a user name or a password, which configs,
    checkpoints and logs would show to others; and for one that is no place of files.
    """
    match = _URL.match(text)
    if match is None:
        return os.path.expanduser(text)
    protocol, place = match[1].lower(), match[2]
    if protocol == "file":
        return place
    if "@" in place.split("/", 1)[0]:
        raise ValueError(
            "should be a URL without user name and password, which configs and logs would show; "
            "credentials belong in the environment or the provider's own files (docs/storage.md)"
        )
    if "?" in place or "#" in place or "::" in text:
        raise ValueError("should be a URL without `?`, `#` and `::`, as s3://bucket/folder")
    if not place.strip("/"):
        raise ValueError("should name a bucket, as s3://bucket/folder")
    return f"{protocol}://{place.rstrip('/')}"


def absolute(text: str) -> str:
    """Returns a path that means the same from any working directory; a URL does already."""
    return text if is_url(text) else os.path.abspath(text)
