"""Calls functions in children of a process with a fake GPU (server.py)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from tests.fake_gpu.pipes import receive, send
from tests.fake_gpu.report import ROOT


class Server:
    """The process; it imports torch and the trainer once."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fake_gpu.server"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, function: Callable[..., Any], *args: Any, **setup: Any) -> Any:
        """Returns `function(gpu, *args)`, called in a child with a fake GPU.

        `setup` as `fake_gpu` takes it. Raises AssertionError with the child's traceback.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = function.__module__, function.__qualname__, args, setup
        send(self._process.stdin, pickle.dumps(job))
        good, result = pickle.loads(receive(self._process.stdout))
        if not good:
            raise AssertionError(result)
        return result

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@cache
def _server() -> Server:
    return Server()


def run(function: Callable[..., Any], *args: Any, **setup: Any) -> Any:
    """As `Server.run`, in the one server of this test session."""
    return _server().run(function, *args, **setup)
