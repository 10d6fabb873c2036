"""Scores many answers at a time, in processes that may hang, die or print without end."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self

from trainer.config.post import SandboxConfig
from trainer.post.checkers.response import Response, Score
from trainer.process.errors import PostTrainingError

_START_SECONDS = 120.0
_LINE_BYTES = 1 << 16


class CheckerPool:
    """Worker processes that score answers; a context that ends them.

    An answer whose checker fails (raises, does not return, ends its process, or returns no number
    from 0 to 1) gets reward 0, so that groups keep their size and the model has no advantage from
    text that breaks checkers.

    Attributes:
        failures: how often checkers failed, by (checker, kind).
    """

    def __init__(
        self,
        checkers: Collection[str],
        sandbox: SandboxConfig,
        workers: int,
        seconds: float = 60.0,
    ) -> None:
        """Starts one worker, and others when they are needed.

        Args:
            checkers: names as in `load_checker`.
            workers: how many answers are scored at a time.
            seconds: until a check counts as hung.

        Raises:
            PostTrainingError: a checker cannot be loaded, or `unit_tests` is among them and this
                machine cannot isolate code.
        """
        self.failures: Counter[tuple[str, str]] = Counter()
        settings = {
            "sandbox": sandbox.model_dump(mode="json"),
            "checkers": sorted(set(checkers)),
            "uses_sandbox": "unit_tests" in checkers,
        }
        self._workers = [_Worker(settings, seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # Workers end with the thread that started them, so these threads live as long as the pool.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="checkers")
        try:
            self._threads.submit(self._workers[0].start).result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(
        self, answers: Iterable[tuple[str, Response]], beat: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """Returns the score of each (checker, answer), in order; calls `beat` after each."""
        answers = list(answers)
        scores = []
        for score in self._threads.map(self._score, answers):
            scores.append(score)
            beat()
        for (checker, _), score in zip(answers, scores, strict=True):
            if score.failure:
                self.failures[checker, score.kind] += 1
        return scores

    def close(self) -> None:
        """Ends the workers, those that hang as well."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()

    def _score(self, answer: tuple[str, Response]) -> Score:
        worker = self._idle.get()
        try:
            return worker.score(*answer)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, which is started again after it was killed."""

    def __init__(self, settings: dict[str, Any], seconds: float) -> None:
        self._settings, self._seconds = json.dumps(settings), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._results = -1

    def start(self) -> None:
        """Starts the process, if it does not run.

        Raises PostTrainingError where it cannot work.
        """
        if self._process is not None:
            return
        self._results, writer = os.pipe()
        arguments = [str(writer), str(os.getpid()), self._settings]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.post.checkers.worker", *arguments],
                stdin=subprocess.PIPE,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        ready = self._read(_START_SECONDS)
        if not isinstance(ready, dict) or "error" in ready:
            reason = ready["error"] if isinstance(ready, dict) else f"a checker process {ready}"
            self.stop()
            raise PostTrainingError(reason)

    def score(self, checker: str, response: Response) -> Score:
        """Returns the score of one answer; kills the process if it takes too long."""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        request = {"checker": checker, "response": response.model_dump(mode="json")}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            fields = self._read(self._seconds)
        except BrokenPipeError:
            fields = "died"
        if isinstance(fields, str):
            self.stop()
            text = (
                f"took more than {self._seconds:g} s" if fields == "hung" else "ended its process"
            )
            return Score(0.0, f"it {text}", fields)
        if "error" in fields:
            raise PostTrainingError(fields["error"])
        return Score(fields.get("reward", 0.0), fields.get("failure", ""), fields.get("kind", ""))

    def stop(self) -> None:
        """Kills the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            os.close(self._results)

    def _read(self, seconds: float) -> Any:
        """Returns the next line's fields, or why there are none: `hung` or `died`."""
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._results], [], [], left)[0]:
                return "hung"
            data = os.read(self._results, _LINE_BYTES)
            if not data or len(line) > _LINE_BYTES:
                return "died"
            line += data
        return json.loads(line)
