"""Muon and AdamW with states divided over the ranks that hold the same parameters.

A step has three phases, each for every group of parameters that the same ranks hold:
  reduce   gradients are packed chunk by chunk into the buffer of `optim.zero.plan`, summed and
           scattered to their owners, each chunk as soon as backward has completed its gradients.
           Shards of matrices are then gathered at their assembly rank.
  update   every owner runs `optim.optimizer` on its own matrices and slices: momentum,
           Newton–Schulz once for every matrix, AdamW; all in fp32.
  gather   updated matrices are scattered to the ranks that shard them, then all parameters are
           all-gathered from their owners, rounded to their precision before, one chunk in flight
           while the one before is copied.

Only owners hold fp32 masters and states. With one owner there are no chunks: masters take gradients
directly from the parameters. Source: hybrid ZeRO, report §3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.config import OptimConfig
from optim.optimizer import Optimizer
from optim.partition import Assignment
from optim.syrk import Syrk, syrk_
from optim.zero.bucket import Bucket
from optim.zero.group import ParameterGroup, StateSlice
from optim.zero.send_queue import SendQueue

CHUNK_ELEMENTS = 32 * 1024 * 1024  # 128 MiB of fp32: long enough to use the links fully


class HybridZero:
    """Updates the parameters of all `groups` in place; `syrk` as in `Optimizer`.

    All ranks call every method together. A parameter whose gradient is None keeps its value and
    state; which these are must be the same on all ranks. Raises OptimError where the
    names of a group's parameters differ from those of its `local_parameters`.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: OptimConfig,
        seed: int = 0,
        chunk_elements: int = CHUNK_ELEMENTS,
        syrk: Syrk = syrk_,
    ) -> None:
        self.config = config
        self.seed = seed
        self.buckets = [
            Bucket(number, group, chunk_elements)
            for number, group in enumerate(groups)
            if group.local_parameters
        ]
        self._masters: dict[str, Parameter] = {}
        table: list[Assignment] = []
        for bucket in self.buckets:
            self._masters |= bucket.masters
            table += bucket.table
        self.inner = Optimizer(self._masters, table, config, syrk)
        self._queue = SendQueue(self.buckets)

    @property
    def step_count(self) -> int:
        """Number of steps so far."""
        return self.inner.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self.inner.step_count = count

    @property
    def table(self) -> list[Assignment]:
        """The assignments of the masters that this rank owns."""
        return self.inner.table

    def expect(self, additions: Mapping[str, int]) -> None:
        """Lets the next backward send gradients while it runs.

        `additions` is, by name, the maximum number of times that backward adds to a parameter's
        `.grad`; its chunks are sent after that many. A parameter with fewer is sent by `reduce`.
        """
        self._queue.open(additions, self._rounding_seed())

    def reduce(self) -> None:
        """Sums every `.grad` over the ranks that hold the parameter, at the owner of each slice."""
        with torch.no_grad():
            self._queue.finish(self._rounding_seed())

    def _rounding_seed(self) -> int:
        return self.seed * 1_000_003 + self.step_count

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared norm of all gradients, after `reduce`: 0-dim fp64.

        The sum over all ranks counts every element once.
        """
        device = self.buckets[0].device if self.buckets else None
        total = torch.zeros((), dtype=torch.float64, device=device)  # a copy to it would wait
        for bucket in self.buckets:
            gradients = [m.grad for m in bucket.masters.values() if m.grad is not None]
            if gradients:
                norms = torch._foreach_norm(gradients, dtype=torch.float64)
                total += torch.stack(norms).square().sum() / bucket.replica_count
        return total

    def owned(self) -> list[Parameter]:
        """The fp32 masters of this rank, with the `.grad` that `reduce` set; for clipping."""
        return list(self._masters.values())

    def gradients(self) -> Iterator[StateSlice]:
        """The gradients that `reduce` left at this owner."""
        for bucket in self.buckets:
            for key, master in bucket.masters.items():
                if master.grad is not None:
                    yield bucket.state_slice("gradient", key, master.grad)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates and gathers the parameters; frees the masters' gradients."""
        self.inner.step(learning_rate)
        for master in self._masters.values():
            master.grad = None
        self.write_parameters()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Rounds the masters into the parameters of all ranks."""
        for bucket in self.buckets:
            bucket.gather()

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Sets the masters from the parameters, after weights were loaded into the model."""
        for bucket in self.buckets:
            bucket.read()

    def states(self) -> Iterator[StateSlice]:
        """All state tensors of this rank, live; a resume also needs `step_count`.

        Masters of fp32 parameters are not included. To restore, copy into these tensors and into
        the fp32 parameters, then call `restored`.
        """
        bucket_of = {key: bucket for bucket in self.buckets for key in bucket.masters}
        tensors = self.inner.state_tensors()
        for key, bucket in bucket_of.items():
            if bucket.is_low:
                tensors[f"master.{key}"] = self._masters[key].detach()
        for label, tensor in tensors.items():
            kind, _, key = label.partition(".")
            yield bucket_of[key].state_slice(kind, key, tensor)

    @torch.no_grad()
    def restored(self) -> None:
        """Makes masters and parameters agree after `states` were copied into."""
        for bucket in self.buckets:
            if bucket.is_low:
                bucket.gather()
            else:
                bucket.read()
