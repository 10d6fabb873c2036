"""Rounding of keys and entries as inference stores them (official code; docs/quantisation.md).

The dims that RoPE rotates stay as they are. The others are E4M3, with one power of two as scale for
every 64 of them, the last block being smaller where 64 does not divide them. The scale is the
smallest with which the largest magnitude of the block is at most 448; that magnitude counts as at
least 1e-4.

N keys or entries; K their width; R rotary dims; B blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.kernels.block_sizes import KV_BLOCK
from model.kernels.fp8.eager import round_e4m3
from model.kernels.mxfp4 import straight_through

_MIN_LARGEST = 1e-4


def fake_quantise_kv(kv_NK: Tensor, rotary: int) -> Tensor:
    """Rounds all but the last ``rotary`` dims of [N, K]; the gradient passes unchanged.

    Rounded numbers have four significant bits, so fp32, bf16 and the attention kernels hold them
    exactly. Blocks with a NaN or an infinity become NaN.
    """
    plain = kv_NK.shape[1] - rotary
    blocks = -(-plain // KV_BLOCK)
    filled = F.pad(kv_NK.detach()[:, :plain], (0, blocks * KV_BLOCK - plain))
    tiles_NBk = filled.reshape(len(kv_NK), blocks, KV_BLOCK)
    largest = tiles_NBk.abs().amax(-1, keepdim=True).clamp_min(_MIN_LARGEST)
    values = kv_NK.detach().clone()
    values[:, :plain] = round_e4m3(tiles_NBk, largest).flatten(1)[:, :plain]
    return straight_through(kv_NK, values)
