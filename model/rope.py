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

    With ``yarn`` (YaRN, "NTK-by-parts"): pairs with more than beta_fast rotations within the
    original context keep their frequency, pairs with fewer than beta_slow have it divided by
    ``factor``, with a linear ramp between. V4's attention factor (mscale) is 1.
    """
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / theta ** (pairs / rotary_dim)
    if yarn is None:
        return plain

    def pair_with_rotations(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(yarn.beta_slow)), rotary_dim - 1)
    # An end before the start turns the ramp around, as in the official code and in transformers.
    width = high - low or 0.001
    index = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
    ramp = ((index - low) / width).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def layer_frequencies(
    config: ModelConfig, compressed: bool, device: torch.device | str = "cpu"
) -> Tensor:
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
