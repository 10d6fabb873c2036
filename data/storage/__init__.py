"""Files in object storage, by URL, beside the paths of local files.

`as_path` makes a `StoragePath` of a URL and a `pathlib.Path` of anything else. fsspec does the
work, s3fs and gcsfs are its drivers; they are imported with the first URL.
"""

from data.storage.parts import Parts
from data.storage.path import READ_BYTES, AnyPath, StoragePath, as_path, size_of
from data.storage.reader import RangeReader
from data.storage.search import StoredObject, describe, match, objects_below
from data.storage.url import absolute, check_url, is_url

__all__ = [
    "READ_BYTES",
    "AnyPath",
    "Parts",
    "RangeReader",
    "StoragePath",
    "StoredObject",
    "absolute",
    "as_path",
    "check_url",
    "describe",
    "is_url",
    "match",
    "objects_below",
    "size_of",
]
