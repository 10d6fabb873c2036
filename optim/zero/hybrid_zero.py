"""Muon and AdamW with states divided over the ranks that hold the same parameters.

A step has three phases, each for every group of parameters that the same ranks hold:
  reduce   gradients go out once: chunk by chunk into the layout of `optim.zero.plan`, summed and
           scattered to the owners, each chunk as soon as backward has left its last gradient.
           Parts of matrices that other ranks split go on to their home.
  update   every owner runs `optim.optimizer` on its own matrices and runs of elements: momentum,
           Newton–Schulz once for every matrix, AdamW; all in fp32.
  gather   parameters come back once: parts to the ranks that split them, then from every owner to
           all, one chunk on the way while the one before is copied. They are rounded before.

fp32 masters and states are at the owner alone. With one owner it is the same path, and the
communication does nothing. Hybrid ZeRO is the V4 report's (arXiv 2606.19348, infrastructure).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.config import OptimConfig
from optim.optimizer import Optimizer
from optim.partition import Assignment
from optim.zero.bucket import Bucket
from optim.zero.group import Group, StatePiece
from optim.zero.send_queue import ChunkQueue

CHUNK_ELEMENTS = 32 * 1024 * 1024  # 128 MiB of fp32: long enough to use the links fully


class HybridZero:
    """Updates the parameters of all `groups` in place as `table` says.

    All ranks call every method together. A parameter whose gradient is None is left alone; which
    these are must be the same on all ranks. Raises OptimError where groups and table do not fit.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        config: OptimConfig,
        seed: int = 0,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self.config = config
        self.seed = seed
        self.buckets = [
            Bucket(number, group, chunk_elements)
            for number, group in enumerate(groups)
            if group.held
        ]
        owned: dict[str, Parameter] = {}
        table: list[Assignment] = []
        for bucket in self.buckets:
            owned |= bucket.masters
            table += bucket.table
        self._owned = owned
        self._inner = Optimizer(owned, table, config)
        self._queue = ChunkQueue(self.buckets)

    @property
    def step_count(self) -> int:
        """Steps so far."""
        return self._inner.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._inner.step_count = count

    @property
    def table(self) -> list[Assignment]:
        """What this rank owns."""
        return self._inner.table

    def expect(self, gradients: Mapping[str, int]) -> None:
        """Let `reduce` begin during backward.

        `gradients` says by name how often backward adds to a parameter's `.grad` at most; the chunk
        that it belongs to is sent once that has happened. What got fewer waits for `reduce`.
        """
        self._queue.open(gradients, self._seed())

    def reduce(self) -> None:
        """Sum every parameter's `.grad` over the ranks that hold it, at the owner of each piece."""
        with torch.no_grad():
            self._queue.finish(self._seed())

    def _seed(self) -> int:
        return self.seed * 1_000_003 + self.step_count

    def norm_square(self) -> Tensor:
        """This rank's part of the squared norm of all gradients: to be summed over all ranks.

        0-dim fp64. Every element is counted once over all ranks, after `reduce`.
        """
        total = torch.zeros((), dtype=torch.float64)
        for bucket in self.buckets:
            gradients = [m.grad for m in bucket.masters.values() if m.grad is not None]
            if gradients:
                norms = torch._foreach_norm(gradients, dtype=torch.float64)
                total = total.to(bucket.device)
                total += torch.stack(norms).square().sum() / bucket.copies
        return total

    def owned(self) -> list[Parameter]:
        """The fp32 pieces that this rank owns, whose `.grad` `reduce` has set; for clipping."""
        return list(self._owned.values())

    def gradients(self) -> Iterator[StatePiece]:
        """What `reduce` left here."""
        for bucket in self.buckets:
            for key, master in bucket.masters.items():
                if master.grad is not None:
                    yield bucket.state("gradient", key, master.grad)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update at `learning_rate` from what `reduce` left, and the gathered parameters."""
        self._inner.step(learning_rate)
        for master in self._owned.values():
            master.grad = None
        self.write_parameters()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round the masters into the parameters of all ranks."""
        for bucket in self.buckets:
            bucket.gather()

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Take the masters anew from the parameters, after weights were loaded into the model."""
        for bucket in self.buckets:
            bucket.read()

    def states(self) -> Iterator[StatePiece]:
        """Everything that a resume needs of this rank, as live tensors.

        Masters of fp32 parameters are not among them. To restore, copy into them and into the
        fp32 parameters, then call `restored`.
        """
        where = {key: bucket for bucket in self.buckets for key in bucket.masters}
        tensors = self._inner.state_tensors()
        for key, bucket in where.items():
            if bucket.is_low:
                tensors[f"master.{key}"] = self._owned[key].detach()
        for label, tensor in tensors.items():
            kind, _, key = label.partition(".")
            yield where[key].state(kind, key, tensor)

    @torch.no_grad()
    def restored(self) -> None:
        """Bring masters and parameters together after `states` were copied into."""
        for bucket in self.buckets:
            if bucket.is_low:
                bucket.gather()
            else:
                bucket.read()
