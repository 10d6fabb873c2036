"""Starts the server in a process of its own, and sets its faults."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.storage import retries

ROOT = Path(__file__).parents[2]


@dataclass
class S3Server:
    """A running server; `environment` leads to it and has credentials that it accepts."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing-id",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # what repeats is ours
        }

    def set_faults(self, *faults: dict[str, Any]) -> None:
        self._ask("faults", json.dumps(faults).encode())

    def applied(self) -> list[int]:
        """How often each fault applied."""
        return self._ask("faults")

    def requests(self) -> list[str]:
        """Method and target of every request so far."""
        return self._ask("requests")

    def make_bucket(self, name: str) -> str:
        request = urllib.request.Request(f"{self._url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=20).close()
        return f"s3://{name}"

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _ask(self, what: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{self._url}/{what}", data, timeout=20) as answer:
            return json.load(answer)


@contextmanager
def start_server(module: str = "tests.s3.server", *arguments: str) -> Iterator[S3Server]:
    """Yields a server; this process and those it starts are led to it meanwhile."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    server = S3Server(int(process.stdout.readline()))
    before = dict(os.environ)
    os.environ.update(server.environment)
    retries._driver.cache_clear()  # it may be connected to another server
    try:
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        retries._driver.cache_clear()
        process.kill()
        process.wait()
