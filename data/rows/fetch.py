"""Fetches from object storage what the coming steps read, many requests at a time.

Which documents a step reads is known before: the order is a function of the seed. Where the cache
has room for all shards, the blocks that it lacks are fetched whole, each once. Otherwise a block
would be gone before its next document is read, so that the documents alone are fetched, into
memory: near ones in one request, up to `data.cache.ahead_bytes` of them, which the longer they are
known the fewer requests need.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from threading import Thread

from data.block_cache import BLOCK_BYTES, CachedObject

_AT_ONCE = 32  # requests
_GAP_BYTES = 64 << 10  # between documents that one request fetches: as long as a request takes
_REQUEST_BYTES = BLOCK_BYTES
_MAX_STEPS = 256  # ahead
_PLAN_STEPS = 32  # at a time, which takes a tenth of a second


@dataclass(frozen=True)
class ByteRange:
    """The bytes `start` until before `end` of an object."""

    object: CachedObject
    start: int
    end: int


@dataclass
class _Chunk:
    """Steps that are planned together, up to before `end`.

    Attributes:
        size: bytes of documents in memory.
        requests: those that each step waits for.
        ranges: what is in memory, released with the chunk.
    """

    end: int
    size: int
    requests: dict[int, list[Future[None]]]
    ranges: set[ByteRange]


class Fetcher:
    """Fetches ahead for a loader.

    Arguments:
        ranges_of: what a step reads; None where it is not to be planned yet, from this step on.
        fits: whether the cache has room for all shards.
        ahead_bytes: of documents in memory.
    """

    def __init__(
        self,
        ranges_of: Callable[[int, int], list[ByteRange] | None],
        fits: bool,
        ahead_bytes: int,
    ) -> None:
        self._ranges_of, self._fits, self._ahead_bytes = ranges_of, fits, ahead_bytes
        self._chunks: deque[_Chunk] = deque()
        self._next = -1  # first step that is not planned
        self._threads = _DaemonThreads(_AT_ONCE)

    def prepare(self, step: int) -> None:
        """Waits for what a step reads, and plans more of the coming steps.

        A request that failed is left to the read, which repeats it and raises.
        """
        while self._chunks and self._chunks[0].end <= step:
            self._release(self._chunks.popleft())
        first = self._chunks[0] if self._chunks else None
        if first is None or step not in first.requests:
            while self._chunks:  # the run has jumped
                self._release(self._chunks.popleft())
            self._next = step
            self._plan(step, 1)
        size = sum(chunk.size for chunk in self._chunks)
        if size < self._ahead_bytes // 2 and self._next - step < _MAX_STEPS // 2:
            self._plan(step, _PLAN_STEPS)  # many at a time, whose documents are nearer
        if self._chunks:
            wait(self._chunks[0].requests.get(step, []))

    def _release(self, chunk: _Chunk) -> None:
        for futures in chunk.requests.values():
            for future in futures:
                future.cancel()
        for one in chunk.ranges.difference(*(other.ranges for other in self._chunks)):
            one.object.staged.pop((one.start, one.end), None)

    def _plan(self, now: int, steps: int) -> None:
        """Plans up to `steps` steps from `_next` on, within half of the memory."""
        wanted: list[tuple[int, ByteRange]] = []
        size, begin = 0, self._next
        while self._next < min(begin + steps, now + _MAX_STEPS) and size < self._ahead_bytes // 2:
            ranges = self._ranges_of(self._next, now)
            if ranges is None:
                break
            wanted += [(self._next, one) for one in ranges]
            size += sum(one.end - one.start for one in ranges)
            self._next += 1
        if self._next == begin:
            return
        requests: dict[int, list[Future[None]]] = {s: [] for s in range(begin, self._next)}
        groups = self._blocks(wanted) if self._fits else self._near(wanted)
        for steps_of, action in sorted(groups, key=lambda group: min(group[0])):
            future = self._threads.submit(action)
            for number in steps_of:
                requests[number].append(future)
        in_memory = set() if self._fits else {one for _, one in wanted}
        self._chunks.append(_Chunk(self._next, 0 if self._fits else size, requests, in_memory))

    def _blocks(
        self, wanted: Iterable[tuple[int, ByteRange]]
    ) -> list[tuple[set[int], Callable[[], None]]]:
        """The steps that need each block that the cache lacks, and what fetches it."""
        steps_of: dict[tuple[CachedObject, int], set[int]] = {}
        for step, one in wanted:
            for number in range(one.start // BLOCK_BYTES, -(-one.end // BLOCK_BYTES)):
                steps_of.setdefault((one.object, number), set()).add(step)
        return [
            (steps, partial(_fetch_block, file, number))
            for (file, number), steps in steps_of.items()
            if not file.has_block(number)
        ]

    def _near(
        self, wanted: Iterable[tuple[int, ByteRange]]
    ) -> list[tuple[set[int], Callable[[], None]]]:
        """The steps that need each run of near documents, and what fetches it into memory."""
        ordered = sorted(wanted, key=lambda pair: (id(pair[1].object), pair[1].start))
        groups = []
        for _, of_object in groupby(ordered, key=lambda pair: id(pair[1].object)):
            run: list[tuple[int, ByteRange]] = []
            begin = end = 0
            for step, one in of_object:
                far = one.start > end + _GAP_BYTES or one.end > begin + _REQUEST_BYTES
                if run and far:
                    groups.append(_request(run))
                    run = []
                if not run:
                    begin = end = one.start
                run.append((step, one))
                end = max(end, one.end)
            groups.append(_request(run))
        return groups


class _DaemonThreads:
    """Threads that run actions in order, and do not keep a process that ends from ending.

    Those of `ThreadPoolExecutor` would first finish everything that was fetched ahead.
    """

    def __init__(self, count: int) -> None:
        self._queue: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
        for number in range(count):
            Thread(target=self._run, name=f"fetch-{number}", daemon=True).start()

    def submit(self, action: Callable[[], None]) -> Future[None]:
        """Returns the future of an action, which a thread runs."""
        future: Future[None] = Future()
        self._queue.put((future, action))
        return future

    def _run(self) -> None:
        while True:
            future, action = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                action()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)


def _fetch_block(file: CachedObject, number: int) -> None:
    file.fetch_block(number)


def _request(run: list[tuple[int, ByteRange]]) -> tuple[set[int], Callable[[], None]]:
    file = run[0][1].object
    ranges = [(one.start, one.end) for _, one in run]
    return {step for step, _ in run}, partial(file.stage, ranges)
