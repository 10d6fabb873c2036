"""moto's S3 server with the files of a folder in its memory, without requests to send them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from tests.s3.client import S3Server, start_server
from tests.s3.server import main

REGION = "us-east-1"


@contextmanager
def serve_folder(folder: Path, bucket: str, *faults: dict[str, object]) -> Iterator[str]:
    """Yields the URL of the folder's files on a server that shows `faults`."""
    with started_with(folder, bucket) as server:
        server.set_faults(*faults)
        yield f"s3://{bucket}/{folder.name}"


@contextmanager
def started_with(folder: Path, bucket: str) -> Iterator[S3Server]:
    """Yields a server that has the files of `folder` below its name in a bucket."""
    with start_server("benchmarks.data.objects", str(folder), bucket) as server:
        yield server


def load(folder: Path, bucket: str) -> None:
    """Puts the files of a folder into the backend of this process."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(bucket, REGION)
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"{folder.name}/{path.relative_to(folder)}"
            backend.put_object(bucket, name, path.read_bytes())


if __name__ == "__main__":
    load(Path(sys.argv[1]), sys.argv[2])
    main()
