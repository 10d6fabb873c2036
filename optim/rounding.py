"""Rounding fp32 to bf16 so that the mean of many roundings is the number itself."""

import torch
from torch import Tensor


def round_stochastically(tensor: Tensor, seed: int) -> Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean. NaN stays NaN.

    Sixteen random bits are added to those that bf16 drops. The same seed gives the same bits.
    """
    generator = None  # meta tensors have no values
    if not tensor.is_meta:
        generator = torch.Generator(tensor.device).manual_seed(seed % 2**63)
    bits = tensor.contiguous().view(torch.int32)
    noise = torch.randint(
        2**16, bits.shape, dtype=torch.int32, device=tensor.device, generator=generator
    )
    rounded = (bits + noise).bitwise_and(-(2**16)).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded, tensor).bfloat16()
