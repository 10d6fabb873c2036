"""Rows of a cache in memory: as they are computed, or packed as inference stores them.

N rows; K their width; R rotary dims; J width of an index key; X any width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import mxfp4
from model.kernels.block_sizes import KV_BLOCK, MXFP4_BLOCK
from model.kernels.fp8.kv import quantise_kv

_UNPACKED_AT_ONCE = 4096


class Rows(Protocol):
    """A table of rows that is written and read by index."""

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replaces the rows at these indices."""

    def read(self, index: Tensor) -> Tensor:
        """Returns the rows at these indices."""

    def table(self, needed: Callable[[], Tensor]) -> Tensor:
        """Returns a table of all rows, of which only those at the indices `needed()` are valid."""

    @property
    def num_bytes(self) -> int:
        """Memory of the table. [bytes]"""


class PlainRows:
    """Rows in the dtype in which they are computed."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.zeros(count, width, dtype=dtype, device=device)

    def write(self, index: Tensor, rows: Tensor) -> None:
        self._values.index_copy_(0, index, rows)

    def read(self, index: Tensor) -> Tensor:
        return self._values.index_select(0, index)

    def table(self, needed: Callable[[], Tensor]) -> Tensor:
        return self._values

    @property
    def num_bytes(self) -> int:
        return self._values.nbytes


class PackedKV:
    """Keys or entries in FP8, a scale for every 64 dims; rotary dims stay as they are.

    Lossless for rows that `model.kernels.fp8.kv.fake_quantise_kv` has rounded.
    """

    def __init__(
        self, count: int, width: int, rotary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, plain = dtype, width - rotary
        blocks = -(-plain // KV_BLOCK)
        self._numbers = torch.zeros(count, plain, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(count, blocks, dtype=torch.uint8, device=device)
        self._rotary = torch.zeros(count, rotary, dtype=dtype, device=device)

    def write(self, index: Tensor, rows: Tensor) -> None:
        plain = self._numbers.shape[1]
        numbers, scales = quantise_kv(rows[:, :plain])
        self._numbers.index_copy_(0, index, numbers.view(torch.uint8))
        self._scales.index_copy_(0, index, scales.view(torch.uint8))
        self._rotary.index_copy_(0, index, rows[:, plain:])

    def read(self, index: Tensor) -> Tensor:
        stored = (self._numbers, self._scales, self._rotary)
        numbers, scales, rotary = (x.index_select(0, index) for x in stored)
        values = numbers.view(torch.float8_e4m3fn).float()
        padded = F.pad(values, (0, -values.shape[1] % KV_BLOCK)).unflatten(1, (-1, KV_BLOCK))
        padded = padded * scales.view(torch.float8_e8m0fnu).float()[..., None]
        plain = padded.flatten(1)[:, : values.shape[1]].to(self._dtype)
        return torch.cat([plain, rotary], dim=1)

    def table(self, needed: Callable[[], Tensor]) -> Tensor:
        width = self._numbers.shape[1] + self._rotary.shape[1]
        return _unpack(self, self._rotary.new_empty(len(self._numbers), width), needed())

    @property
    def num_bytes(self) -> int:
        return self._numbers.nbytes + self._scales.nbytes + self._rotary.nbytes


class PackedIndexKeys:
    """Keys of the indexer in MXFP4, a scale for every 32 dims.

    Lossless for rows that `model.kernels.mxfp4.fake_quantise` has rounded.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._codes = torch.zeros(count, width // 2, dtype=torch.int8, device=device)
        self._scales = torch.zeros(count, width // MXFP4_BLOCK, dtype=torch.uint8, device=device)

    def write(self, index: Tensor, rows: Tensor) -> None:
        packed = mxfp4.quantise(rows)
        self._codes.index_copy_(0, index, packed.codes)
        self._scales.index_copy_(0, index, packed.scales.view(torch.uint8))

    def read(self, index: Tensor) -> Tensor:
        codes, scales = (x.index_select(0, index) for x in (self._codes, self._scales))
        packed = mxfp4.Packed(codes, scales.view(torch.float8_e8m0fnu))
        return mxfp4.dequantise(packed, self._dtype)

    def table(self, needed: Callable[[], Tensor]) -> Tensor:
        count, width = len(self._codes), 2 * self._codes.shape[1]
        return _unpack(self, self._codes.new_empty(count, width, dtype=self._dtype), needed())

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes


def _unpack(rows: Rows, table_NX: Tensor, needed: Tensor) -> Tensor:
    """Fills rows of a table, in parts, so that intermediate tensors are small."""
    for index in needed.split(_UNPACKED_AT_ONCE):
        table_NX.index_copy_(0, index, rows.read(index))
    return table_NX
