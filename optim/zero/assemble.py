"""Gathers sharded matrices at their assembly ranks, and scatters them back.

Letters: N matrices, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optim.zero.group import ParameterGroup
from optim.zero.plan import OwnedSlice


class MatrixAssembler:
    """One owner's exchange with the ranks that hold the other shards of its matrices.

    Attributes:
        sharded: slices of sharded matrices, in the order of their assembly ranks.
        assembled: those whose assembly rank is this one.
    """

    def __init__(self, group: ParameterGroup, slices: Sequence[OwnedSlice]) -> None:
        self.group, self.ranks = group, group.shard_ranks
        by_rank = [
            [owned for owned in slices if owned.assembly_rank == rank]
            for rank in range(self.ranks.size)
        ]
        self.sharded = [owned for some in by_rank for owned in some]
        self.assembled = by_rank[self.ranks.rank]
        self._sizes = [sum(owned.size for owned in some) for some in by_rank]

    def gather(self, shard_of: Callable[[OwnedSlice], Tensor]) -> list[Tensor]:
        """The matrices of `assembled`, each [N, R, C], from the flat shards on all ranks."""
        if not self.sharded:
            return []
        ranks, size = self.ranks.size, self._sizes[self.ranks.rank]
        shards = torch.cat([shard_of(owned) for owned in self.sharded])
        received = self.ranks.all_to_all(shards, self._sizes, [size] * ranks)().view(ranks, -1)
        matrices, start = [], 0
        for owned in self.assembled:
            columns = received[:, start : start + owned.size]
            start += owned.size
            shaped = [self._shard_view(owned, flat) for flat in columns]
            matrices.append(torch.cat(shaped, self._dim(owned)))
        return matrices

    def scatter(
        self, matrices_of: Callable[[OwnedSlice], Tensor]
    ) -> list[tuple[OwnedSlice, Tensor]]:
        """Returns this rank's shards of `sharded`, flat, in the parameters' precision."""
        if not self.sharded:
            return []
        ranks, size = self.ranks.size, self._sizes[self.ranks.rank]
        sent = next(iter(self.group.parameters.values())).new_empty(ranks, size)
        start = 0
        for owned in self.assembled:
            for rank, shard in enumerate(matrices_of(owned).chunk(ranks, self._dim(owned))):
                self._shard_view(owned, sent[rank, start : start + owned.size]).copy_(shard)
            start += owned.size
        received = self.ranks.all_to_all(sent.view(-1), [size] * ranks, self._sizes)()
        shards = received.split([owned.size for owned in self.sharded])
        return list(zip(self.sharded, shards, strict=True))

    def _dim(self, owned: OwnedSlice) -> int:
        """The dimension of [N, R, C] that the ranks split."""
        assert self.group.shard_dim is not None
        dim = self.group.shard_dim[owned.name]
        return dim - self.group.parameters[owned.name].dim() + 3

    def _shard_view(self, owned: OwnedSlice, flat: Tensor) -> Tensor:
        """A flat shard as [N, R, C], where R or C is divided by the number of ranks."""
        assert owned.matrices is not None
        shape = list(owned.matrices)
        shape[self._dim(owned)] //= self.ranks.size
        return flat.view(shape)
