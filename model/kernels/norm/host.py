"""RMS norm and rotary embedding as fused loops for a CPU, in fp32.

n rows; d their width; R rotary dims; m vectors that a row's rotation turns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop

_BLOCK = 64
"""Rows whose contributions to the weight's gradient are added first."""
_F32 = np.float32


def norm_forward(
    x_nd: Tensor, weight_d: Tensor, eps: float, rotation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the normed and rotated rows, and 1/rms of each, [n]."""
    out_nd, rstd_n = x_nd.new_empty(x_nd.shape), x_nd.new_empty(len(x_nd))
    host.over_rows(_norm_rows, x_nd, weight_d, eps, _angles(x_nd, rotation), out_nd, rstd_n)
    return out_nd, rstd_n


def norm_backward(
    x_nd: Tensor, weight_d: Tensor, rstd_n: Tensor, rotation: Tensor | None, grad_nd: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of rows and weight."""
    grad_x_nd = x_nd.new_empty(x_nd.shape)
    parts = x_nd.new_empty(-(-len(x_nd) // _BLOCK), x_nd.shape[1])
    host.over_rows(
        _norm_gradient_blocks,
        *(parts, x_nd, weight_d, rstd_n, _angles(x_nd, rotation), grad_nd, grad_x_nd),
        numbers=x_nd.numel(),
    )
    return grad_x_nd, parts.sum(0)


def rotate(x: Tensor, rotation: Tensor, direction: float) -> Tensor:
    """Rotates the last R dims of [n, ..., d], by the conjugate where ``direction`` is -1."""
    out = x.new_empty(x.shape)
    rows = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
    host.over_rows(_rotate_rows, rows, _angles(x, rotation), direction, out.view(rows.shape))
    return out


def _angles(x_nd: Tensor, rotation: Tensor | None) -> Tensor:
    """Returns cos and sin of every pair as fp32 [n, R]; no columns without a rotation."""
    if rotation is None:
        return x_nd.new_empty(len(x_nd), 0)
    return torch.view_as_real(rotation.resolve_conj()).flatten(1)


@fused_loop
def _norm_rows(
    start: int,
    stop: int,
    x_nd: Array,
    weight: Array,
    eps: float,
    angles: Array,
    out_nd: Array,
    rstd: Array,
) -> None:
    dims = x_nd.shape[1]
    plain = dims - angles.shape[1]
    for n in range(start, stop):
        x, out, angle = x_nd[n], out_nd[n], angles[n]
        total = _F32(0)
        for d in range(dims):
            total += x[d] * x[d]
        scale = _F32(1) / math.sqrt(total / _F32(dims) + _F32(eps))
        rstd[n] = scale
        for d in range(dims):
            out[d] = x[d] * scale * weight[d]
        for d in range(plain, dims, 2):
            even, odd, cos, sin = out[d], out[d + 1], angle[d - plain], angle[d - plain + 1]
            out[d] = even * cos - odd * sin
            out[d + 1] = even * sin + odd * cos


@fused_loop
def _norm_gradient_blocks(
    start: int,
    stop: int,
    parts: Array,
    x_nd: Array,
    weight: Array,
    rstd: Array,
    angles: Array,
    grad_nd: Array,
    grad_x_nd: Array,
) -> None:
    dims = x_nd.shape[1]
    plain = dims - angles.shape[1]
    for block in range(start, stop):
        part = parts[block]
        for d in range(dims):
            part[d] = 0
        for n in range(block * _BLOCK, min((block + 1) * _BLOCK, len(x_nd))):
            x, out, grad, angle, scale = x_nd[n], grad_x_nd[n], grad_nd[n], angles[n], rstd[n]
            for d in range(plain):
                out[d] = grad[d]
            for d in range(plain, dims, 2):
                even, odd, cos, sin = grad[d], grad[d + 1], angle[d - plain], angle[d - plain + 1]
                out[d] = even * cos + odd * sin
                out[d + 1] = odd * cos - even * sin
            along = _F32(0)  # the component along x, which the norm removes
            for d in range(dims):
                part[d] += out[d] * (x[d] * scale)
                out[d] *= weight[d]
                along += out[d] * x[d]
            along *= scale * scale / _F32(dims)
            for d in range(dims):
                out[d] = (out[d] - x[d] * along) * scale


@fused_loop
def _rotate_rows(
    start: int, stop: int, x_nmd: Array, angles: Array, direction: float, out_nmd: Array
) -> None:
    _, vectors, dims = x_nmd.shape
    plain = dims - angles.shape[1]
    for n in range(start, stop):
        angle = angles[n]
        for m in range(vectors):
            x, out = x_nmd[n, m], out_nmd[n, m]
            for d in range(plain):
                out[d] = x[d]
            for d in range(plain, dims, 2):
                even, odd, cos = x[d], x[d + 1], angle[d - plain]
                sin = angle[d - plain + 1] * _F32(direction)
                out[d] = even * cos - odd * sin
                out[d + 1] = even * sin + odd * cos
