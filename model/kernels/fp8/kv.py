"""Rounding of keys and entries as inference stores them (official code; docs/quantisation.md).

The dims that RoPE rotates stay as they are. The others are E4M3, with one power of two as scale for
every 64 of them, the last block being smaller where 64 does not divide them. The scale is the
smallest with which the largest magnitude of the block is at most 448; that magnitude counts as at
least 1e-4.

N keys or entries; K their width; R rotary dims; B blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.block_sizes import KV_BLOCK
from model.kernels.fp8.eager import e4m3_exponents, round_e4m3
from model.kernels.mxfp4 import power_of_two, straight_through

_MIN_LARGEST = 1e-4


def fake_quantise_kv(kv_NK: Tensor, rotary: int) -> Tensor:
    """Rounds all but the last ``rotary`` dims of [N, K]; the gradient passes unchanged.

    Rounded numbers have four significant bits, so fp32, bf16 and the attention kernels hold them
    exactly. Blocks with a NaN or an infinity become NaN.
    """
    plain = kv_NK.shape[1] - rotary
    tiles_NBk, largest = _tiles(kv_NK.detach()[:, :plain])
    values = kv_NK.detach().clone()
    values[:, :plain] = round_e4m3(tiles_NBk, largest).flatten(1)[:, :plain]
    return straight_through(kv_NK, values)


def quantise_kv(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers of rows without rotary dims, float8_e4m3fn [N, K], and their scales.

    Scales are float8_e8m0fnu [N, B], one for every 64 dims. The products are what
    `fake_quantise_kv` returns.
    """
    tiles_NBk, largest = _tiles(x_NK)
    exponents = e4m3_exponents(largest)
    numbers = (tiles_NBk.float() * power_of_two(-exponents)).to(torch.float8_e4m3fn)
    scales = power_of_two(exponents)[..., 0].to(torch.float8_e8m0fnu)
    return numbers.flatten(1)[:, : x_NK.shape[1]].contiguous(), scales


def _tiles(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns blocks [N, B, 64], the last filled with zeros, and their largest magnitudes."""
    blocks = -(-x_NK.shape[1] // KV_BLOCK)
    filled = F.pad(x_NK, (0, blocks * KV_BLOCK - x_NK.shape[1]))
    tiles_NBk = filled.reshape(len(x_NK), blocks, KV_BLOCK)
    return tiles_NBk, tiles_NBk.abs().amax(-1, keepdim=True).clamp_min(_MIN_LARGEST)
