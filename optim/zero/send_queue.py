"""The order in which all ranks send the chunks of a step's gradients, during backward and after."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from optim.zero.bucket import Bucket, Chunk
from optim.zero.group import Wait


class ChunkQueue:
    """The chunks of all buckets in the one order in which every rank sends them.

    Those that backward completes first come first. A chunk is sent when it is complete and all
    before it have been sent. Nothing waits here while backward goes on: other ranks may need this
    one's part of something else before they come as far.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self.chunks = [(bucket, chunk) for bucket in buckets for chunk in bucket.chunks]
        names = [name for bucket in buckets for name in bucket.group.parameters]
        place = {name: number for number, name in enumerate(sorted(names, key=_backward_order))}
        self.chunks.sort(key=lambda c: max((place[run[0].name] for run in c[1].runs), default=0))
        self.of: dict[str, list[int]] = {}
        for number, (_, chunk) in enumerate(self.chunks):
            for name in {run[0].name for run in chunk.runs}:
                self.of.setdefault(name, []).append(number)
        self._is_open, self._seed = False, 0
        self._left: dict[str, int] = {}
        self._missing: list[int] = []
        self._sent = 0
        self._flying: deque[tuple[Bucket, Chunk, Wait]] = deque()
        for bucket in buckets:
            for name, parameter in bucket.group.parameters.items():
                if name in self.of:
                    parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._added(name)

    def open(self, gradients: Mapping[str, int], seed: int) -> None:
        """Send chunks as their gradients become complete."""
        self._left = {name: gradients[name] for name in self.of if gradients.get(name)}
        self._missing = [0] * len(self.chunks)
        for name in self._left:
            for number in self.of[name]:
                self._missing[number] += 1
        self._is_open, self._seed, self._sent = True, seed, 0

    def _added(self, name: str) -> None:
        if not self._is_open:
            return
        self._left[name] -= 1
        if self._left[name] == 0:
            for number in self.of[name]:
                self._missing[number] -= 1
            while self._sent < len(self.chunks) and not self._missing[self._sent]:
                with torch.no_grad():
                    self._send()

    def _send(self) -> None:
        bucket, chunk = self.chunks[self._sent]
        if any(bucket.group.parameters[run[0].name].grad is not None for run in chunk.runs):
            self._flying.append((bucket, chunk, bucket.begin(chunk, self._seed)))
        self._sent += 1

    def finish(self, seed: int) -> None:
        """Send what is left, and take over everything."""
        if not self._is_open:
            self._sent = 0
        self._is_open, self._seed = False, seed
        while self._sent < len(self.chunks) or self._flying:
            if self._sent < len(self.chunks):
                self._send()
            if len(self._flying) > 1 or (self._flying and self._sent == len(self.chunks)):
                bucket, chunk, wait = self._flying.popleft()
                bucket.land(chunk, wait())
        for bucket in self.buckets:
            bucket.finish()


def _backward_order(name: str) -> tuple[int, str]:
    """Heads first, then the layers from the last to the first, then the embedding."""
    if name.startswith("layers."):
        return -int(name.split(".")[1]), name
    return (1 if name == "embed.weight" else -(2**31)), name
