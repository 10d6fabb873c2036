"""The one order in which all ranks send the chunks of a step's gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from optim.zero.bucket import Bucket, Chunk
from optim.zero.group import Pending


class SendQueue:
    """Sends the chunks of all buckets, during backward and after it.

    Chunks are ordered by the time at which backward completes them. A chunk is sent once it is
    complete and all before it have been sent. Nothing waits for a collective during backward,
    which could deadlock: before another rank sends the same chunk, it may need this rank in an
    all-to-all of tokens.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self.chunks = [(bucket, chunk) for bucket in buckets for chunk in bucket.chunks]
        names = [name for bucket in buckets for name in bucket.group.parameters]
        order = {name: number for number, name in enumerate(sorted(names, key=_backward_order))}
        self.chunks.sort(key=lambda item: max((order[n] for n in item[1].names), default=0))
        self._chunks_of: dict[str, list[int]] = {}
        for number, (_, chunk) in enumerate(self.chunks):
            for name in chunk.names:
                self._chunks_of.setdefault(name, []).append(number)
        self._is_open, self._seed = False, 0
        self._additions_left: dict[str, int] = {}
        self._incomplete: list[int] = []
        """By chunk, the number of its parameters whose gradient is not complete."""
        self._sent = 0
        self._in_flight: deque[tuple[Bucket, Chunk, Pending]] = deque()
        for bucket in buckets:
            for name, parameter in bucket.group.parameters.items():
                if name in self._chunks_of:
                    parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._accumulated(name)

    def open(self, additions: Mapping[str, int], seed: int) -> None:
        """Sends chunks from now on, each as soon as its gradients are complete.

        `additions` is how often backward adds to the gradient of each parameter.
        """
        names = [name for name in self._chunks_of if additions.get(name)]
        self._additions_left = {name: additions[name] for name in names}
        self._incomplete = [0] * len(self.chunks)
        for name in names:
            for number in self._chunks_of[name]:
                self._incomplete[number] += 1
        self._is_open, self._seed, self._sent = True, seed, 0

    def _accumulated(self, name: str) -> None:
        if not self._is_open:
            return
        self._additions_left[name] -= 1
        if self._additions_left[name] == 0:
            for number in self._chunks_of[name]:
                self._incomplete[number] -= 1
            while self._sent < len(self.chunks) and not self._incomplete[self._sent]:
                with torch.no_grad():
                    self._send()

    def _send(self) -> None:
        """Sends the next chunk; one without any gradient is not sent."""
        bucket, chunk = self.chunks[self._sent]
        if any(bucket.group.parameters[name].grad is not None for name in chunk.names):
            wait = bucket.start_reduce(chunk, self._seed)
            self._in_flight.append((bucket, chunk, wait))
        self._sent += 1

    def finish(self, seed: int) -> None:
        """Sends the remaining chunks and waits for all, with one in flight while one is copied."""
        if not self._is_open:
            self._sent = 0
        self._is_open, self._seed = False, seed
        while self._sent < len(self.chunks) or self._in_flight:
            if self._sent < len(self.chunks):
                self._send()
            all_sent = self._sent == len(self.chunks)
            if len(self._in_flight) > 1 or (self._in_flight and all_sent):
                bucket, chunk, wait = self._in_flight.popleft()
                bucket.receive(chunk, wait())
        for bucket in self.buckets:
            bucket.finish_reduce()


def _backward_order(name: str) -> tuple[int, str]:
    """Sorts norm, heads and MTP first, then layers from last to first, then the embedding."""
    if name.startswith("layers."):
        return -int(name.split(".")[1]), name
    return (1 if name == "embed.weight" else -(2**31)), name
