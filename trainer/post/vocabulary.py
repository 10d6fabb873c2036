"""What the losses over the whole vocabulary share: fp32 logits of a chunk of tokens.

Letters: n tokens of a chunk, D hidden size, v vocabulary of a tensor rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_logits(hidden_nD: Tensor, weight_vD: Tensor) -> Tensor:
    """Multiplies with fp32 results, whatever the dtype: [n, D] and [v, D] to [n, v]."""
    wide = torch.promote_types(hidden_nD.dtype, torch.float32)
    if hidden_nD.is_cuda and hidden_nD.dtype != wide:
        return torch.mm(hidden_nD, weight_vD.t(), out_dtype=wide)
    return hidden_nD.to(wide) @ weight_vD.to(wide).t()


def add_products(
    grad_nv: Tensor, hidden_nD: Tensor, weight_vD: Tensor, grad_weight_vD: Tensor
) -> Tensor:
    """Adds a chunk's gradient of the head to `grad_weight_vD`, fp32; returns that of hidden_nD.

    The matmuls are in the dtype of `weight_vD`, as those of the cross-entropy.
    """
    grad_nv = grad_nv.to(weight_vD.dtype)
    grad_weight_vD += torch.mm(grad_nv.t(), hidden_nD)
    return torch.mm(grad_nv, weight_vD)
