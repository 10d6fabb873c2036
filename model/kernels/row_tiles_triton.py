"""Tiles of 128 rows that restart at every group, found on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.block_sizes import FP8_BLOCK as BLOCK


class Tiles(NamedTuple):
    """Tiles of up to 128 rows of one group each, int32 on the device.

    Attributes:
        group, first, end: [N], a tile's group and its rows [first, end); surplus tiles are empty.
        before: [E + 1], the number of tiles before each group, and of all.
    """

    group: Tensor
    first: Tensor
    end: Tensor
    before: Tensor


def tiles_of(ends_E: Tensor, rows: int) -> Tiles:
    """Returns the tiles of groups that end at these rows, without a host sync; some are empty."""
    groups = len(ends_E)
    tiles = max((rows + (BLOCK - 1) * groups) // BLOCK, 1)
    group, first, end = ends_E.new_empty(3, tiles, dtype=torch.int32)
    before = ends_E.new_empty(groups + 1, dtype=torch.int32)
    size = triton.next_power_of_2(groups)
    _tiles[(tiles,)](
        ends_E, group, first, end, before, groups, GROUPS=size, BLOCK=BLOCK, num_warps=1
    )
    return Tiles(group, first, end, before)


@triton.jit
def _tiles(
    ends,
    tile_group,
    tile_first,
    tile_end,
    before,
    groups,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the group of each program's tile."""
    tile = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    inside = group < groups
    end = tl.load(ends + group, mask=inside, other=0)
    start = tl.load(ends + group - 1, mask=inside & (group > 0), other=0)
    count = tl.where(inside, (end - start + BLOCK - 1) // BLOCK, 0)
    until = tl.cumsum(count, 0)
    own = (tile < until) & (tile >= until - count)
    first = start + (tile - (until - count)) * BLOCK
    tl.store(tile_group + tile, tl.sum(tl.where(own, group, 0), 0))
    tl.store(tile_first + tile, tl.sum(tl.where(own, first, 0), 0))
    tl.store(tile_end + tile, tl.sum(tl.where(own, tl.minimum(end, first + BLOCK), 0), 0))
    if tile == 0:
        tl.store(before + group, until - count, mask=inside)
        tl.store(before + groups, tl.sum(count, 0))
