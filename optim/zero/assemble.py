"""Matrices that ranks split, made whole at one of them, their home, and given back in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optim.zero.group import Group
from optim.zero.plan import Piece


class Homes:
    """One owner's exchange with the ranks that hold other parts of the matrices that it owns.

    Attributes:
        parts: pieces of which a part is here, those of the first home first.
        here: the pieces of them whose matrices are whole here.
    """

    def __init__(self, group: Group, own: Sequence[Piece]) -> None:
        self.group, self.ranks = group, group.homes
        by_home = [[p for p in own if p.home == home] for home in range(self.ranks.size)]
        self.parts = [piece for pieces in by_home for piece in pieces]
        self.here = by_home[self.ranks.rank]
        self._sizes = [sum(piece.size for piece in pieces) for pieces in by_home]

    def join(self, part_of: Callable[[Piece], Tensor]) -> list[Tensor]:
        """Whole [N, R, C] matrices of all pieces `here`, from the flat parts on all ranks."""
        if not self.parts:
            return []
        mine = [self._sizes[self.ranks.rank]] * self.ranks.size
        sent = torch.cat([part_of(piece) for piece in self.parts])
        rows = self.ranks.all_to_all(sent, self._sizes, mine)().view(self.ranks.size, -1)
        found, start = [], 0
        for piece in self.here:
            run = rows[:, start : start + piece.size]
            start += piece.size
            found.append(torch.cat([self._shaped(piece, row) for row in run], self._dim(piece)))
        return found

    def split(self, whole_of: Callable[[Piece], Tensor]) -> list[tuple[Piece, Tensor]]:
        """All `parts`, flat and in the parameters' precision, of what all homes have made whole."""
        if not self.parts:
            return []
        size, mine = self.ranks.size, self._sizes[self.ranks.rank]
        sent = next(iter(self.group.parameters.values())).new_empty(size, mine)
        start = 0
        for piece in self.here:
            for rank, share in enumerate(whole_of(piece).chunk(size, self._dim(piece))):
                self._shaped(piece, sent[rank, start : start + piece.size]).copy_(share)
            start += piece.size
        received = self.ranks.all_to_all(sent.view(-1), [mine] * size, self._sizes)()
        runs = received.split([piece.size for piece in self.parts])
        return list(zip(self.parts, runs, strict=True))

    def _dim(self, piece: Piece) -> int:
        """Which dimension of [N, R, C] the homes split."""
        assert self.group.split_dim is not None
        dim = self.group.split_dim[piece.name]
        return dim - self.group.parameters[piece.name].dim() + 3

    def _shaped(self, piece: Piece, flat: Tensor) -> Tensor:
        """A flat part of some matrices as [N, R, C], one of the last two divided by the homes."""
        assert piece.matrices is not None
        shape = list(piece.matrices)
        shape[self._dim(piece)] //= self.ranks.size
        return flat.view(shape)
