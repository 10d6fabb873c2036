"""Hyper-connections as loops over streams and tokens (report §2.2, arXiv 2512.24880).

T tokens; N streams; D their width; M = (2+N)·N coefficients. Any device and dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_read_streams(
    streams_TND: Tensor,
    fn: Tensor,
    base_M: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes x [T, D] = Σ_j pre_j X_j, post [T, N] and comb [T, N, N]."""
    n = streams_TND.shape[1]
    w = naive_projections(streams_TND, fn, norm_eps)
    pre = torch.sigmoid(scale[0] * w[:, :n] + base_M[:n]) + hc_eps
    post = 2 * torch.sigmoid(scale[1] * w[:, n : 2 * n] + base_M[n : 2 * n])
    comb = (scale[2] * w[:, 2 * n :] + base_M[2 * n :]).view(-1, n, n)
    x_TD = torch.stack([pre[:, j, None] * streams_TND[:, j] for j in range(n)]).sum(0)
    return x_TD, post, naive_sinkhorn(comb, hc_eps, iterations)


def naive_collapse_streams(
    streams_TND: Tensor,
    fn: Tensor,
    base_N: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
) -> Tensor:
    """Computes the head's weighted sum of the streams, [T, D]."""
    w = naive_projections(streams_TND, fn, norm_eps)
    weight_TN = torch.sigmoid(scale * w + base_N) + hc_eps
    return (weight_TN[..., None] * streams_TND).sum(1)


def naive_write_streams(
    streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor
) -> Tensor:
    """Computes X'_k = post_k · y + Σ_j comb[j, k] · X_j, [T, N, D]."""
    n = streams_TND.shape[1]
    mixed = [
        sum((comb_TNN[:, j, k, None] * streams_TND[:, j] for j in range(n)), torch.zeros_like(y_TD))
        for k in range(n)
    ]
    return torch.stack([post_TN[:, k, None] * y_TD + mixed[k] for k in range(n)], dim=1)


def naive_projections(streams_TND: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Computes RMSNorm(X) · fnᵀ over all streams of a token, [T, M]."""
    flat = streams_TND.flatten(1)
    return flat / torch.sqrt(flat.square().mean(1, keepdim=True) + norm_eps) @ fn.T


def naive_sinkhorn(logits_TNN: Tensor, eps: float, iterations: int) -> Tensor:
    """Makes each token's matrix nearly doubly stochastic.

    Softmax over rows, then normalises columns and rows in turn.
    """
    out = []
    for matrix in logits_TNN:
        matrix = matrix.exp() / matrix.exp().sum(1, keepdim=True) + eps
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
        for _ in range(iterations - 1):
            matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
            matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
        out.append(matrix)
    return torch.stack(out)
