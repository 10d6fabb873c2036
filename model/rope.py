"""Angles of the rotary embedding, in fp32; with YaRN in layers that compress.

Letters: R rotary dims, that is R/2 pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig, Yarn


def inverse_frequencies(
    rotary_dim: int, theta: float, yarn: Yarn | None, device: torch.device | str | None = None
) -> Tensor:
    """Returns the angle per position of every pair, fp32 [R/2].

    With ``yarn`` (Peng et al. 2023, "NTK-by-parts"): pairs that turn more than beta_fast times
    within the original context keep their step, pairs that turn less than beta_slow times have it
    divided by ``factor``, with a linear ramp between. V4 has no attention factor.
    """
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / theta ** (pairs / rotary_dim)
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), rotary_dim - 1)
    width = max(high - low, 0.001)
    index = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
    interpolated = ((index - low) / width).clamp(0, 1)
    return plain / yarn.factor * interpolated + plain * (1 - interpolated)


def layer_frequencies(config: ModelConfig, compressed: bool, device: torch.device) -> Tensor:
    """Returns the angles per position of a layer without or with a compressor, fp32 [R/2]."""
    if compressed:
        return inverse_frequencies(
            config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling, device
        )
    return inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, None, device)


def rotation(position: Tensor, frequencies: Tensor) -> Tensor:
    """Returns cos + i·sin of every position and pair: [n] and [R/2] give complex64 [n, R/2]."""
    angle = position.float()[:, None] * frequencies
    return torch.polar(torch.ones_like(angle), angle)
