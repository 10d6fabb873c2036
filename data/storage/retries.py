"""What a storage's errors mean, and repeating what may succeed a moment later."""

import errno
import os
import random
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from data.activity import print_line
from data.errors import DataError

Item = TypeVar("Item")

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Mean waits before the second attempt and those that follow. [s]"""
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    MemoryError,
)
"""An attempt that ended with one of these ends so again."""
_FINAL_CODES = (errno.EINVAL, errno.ENOSYS, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG)
_FINAL_STATUS = (400, 401, 403, 404, 405, 410, 451)
_CREDENTIALS = re.compile("Credential|ProfileNotFound|TokenRetrieval|RefreshError")
"""Names of the drivers' exceptions about credentials, which are no PermissionError."""
_USER = re.compile(r"//[^/\s@]+@")
_INSTALL = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_WEB = {"client_kwargs": {"trust_env": True}}  # proxies, and the credentials in ~/.netrc
_OPTIONS: dict[str, dict[str, Any]] = {"http": _WEB, "https": _WEB}
_random = random.Random()  # not the generator that others may have seeded


def with_retries(action: Callable[[], Item], url: str) -> Item:
    """Returns `action()`, repeated after growing waits where its failure may pass.

    Raises OSError with the URL and a clause: FileNotFoundError, PermissionError and FileExistsError
    at once, others after the last attempt.
    """
    for delay in (*DELAYS, None):
        try:
            return action()
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            failure = storage_error(error, url)
            if delay is None or is_final(error):
                raise failure from error
        wait = delay * _random.uniform(0.5, 1.5)
        print_line(f"v4: {url}: {failure.strerror}; next attempt in {wait:.1f} s", sys.stderr)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def is_final(error: BaseException) -> bool:
    """Whether another attempt would fail in the same way."""
    if _CREDENTIALS.search(type(error).__name__):
        return True
    code = error.errno if isinstance(error, OSError) else None
    return isinstance(error, _FINAL) or code in _FINAL_CODES or _status(error) in _FINAL_STATUS


def storage_error(error: Exception, url: str) -> OSError:
    """Returns the OSError that stands for an error of a driver."""
    text = _clause(error)
    if _CREDENTIALS.search(type(error).__name__):
        return PermissionError(errno.EACCES, f"no credentials: {text} (docs/storage.md)", url)
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        is_bucket = "bucket does not exist" in text.lower()
        text = "the bucket does not exist" if is_bucket else "does not exist"
        return FileNotFoundError(errno.ENOENT, text, url)
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return PermissionError(errno.EACCES, f"access was refused: {text}", url)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "exists", url)
    code = error.errno if isinstance(error, OSError) else None
    if code in _FINAL_CODES:
        return OSError(code, text, url)
    return OSError(errno.EREMOTEIO, text, url)


def _status(error: BaseException) -> int | None:
    """Returns the status of a web server's answer that is an error, as drivers raise it."""
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    return status if isinstance(status, int) else None


def _clause(error: Exception) -> str:
    """Returns what an error says in one line, without what names a user."""
    # Drivers give OSError one argument, the text, or a number and the text.
    arguments = [one for one in error.args if isinstance(one, str)]
    text = " ".join((arguments[0] if arguments else str(error)).split())
    return _USER.sub("//", text or type(error).__name__).rstrip(".")


def open_driver(protocol: str) -> Any:
    """Returns fsspec's file system for a protocol, without a cache of listings.

    A process has one, with its connections, for all of its threads.

    Raises DataError for an unknown protocol, and for one whose driver is not installed.
    """
    return _driver(protocol, os.getpid())


@lru_cache
def _driver(protocol: str, process: int) -> Any:
    import fsspec

    try:
        options = _OPTIONS.get(protocol, {})
        return fsspec.filesystem(
            protocol, use_listings_cache=False, skip_instance_cache=True, **options
        )
    except ImportError as error:
        extra = _INSTALL.get(protocol)
        if extra is None:
            raise DataError(f"{protocol}:// needs a driver of fsspec: {error}") from None
        raise DataError(
            f"{protocol}:// needs a package that is not installed; install it with: "
            f"pip install 'v4-pretrain[{extra}]'"
        ) from None
    except ValueError:
        raise DataError(
            f"{protocol}:// is no storage that fsspec knows; use s3://, gs:// or a local path"
        ) from None
