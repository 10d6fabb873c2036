"""Pooling of token windows in Triton, forward and backward; compared with ``naive.py``.

A program handles BLOCK_C windows of m tokens and BLOCK_X channels; the softmax runs over a window's
slots in registers. Every element of values and gates contributes to at most one entry (where
windows overlap, one half of the channels goes to the window's own entry and the other to the next
one), so forward reads each once and backward writes each gradient once: no two programs accumulate
into the same element. Only the bias of the gate is shared; it is summed in parts, in a fixed order.

Values and gates are in fp32 (model/compressor.py). Bytes per token, X = K or 2K channels: forward
reads 8·X and writes 4·K/m; backward reads 8·X + 4·K/m and writes 8·X, plus 8·X to zero-initialise
both gradients, because some elements of values and gates enter no entry. The arithmetic, about 10
FLOPs per element, takes far less time:

    roofline per token at 3.35 TB/s (H100)   forward   backward   measured
    HCA, K = 512, m = 128                     1.2 ns     3.7 ns   not yet timed
    CSA, K = 512, m = 4                       2.6 ns     7.5 ns   not yet timed
    CSA's indexer, J = 128, m = 4             0.6 ns     1.9 ns   not yet timed

They are equal for Flash and Pro, whose K, J and m are equal.

The norm and rotation of pooled entries are one more kernel, ``norm_triton.py``, which reads 4·K/m
and writes 2·K/m bytes per token. Here they would need whole rows in a program, for which HCA's 128
tokens leave no registers; for CSA they would save 8·K/m of the 10·K/m bytes that follow the 16·K of
the inputs, a ninth of its time.

T tokens; C entries; m tokens of a window (M); K an entry's width (DIM); X = K or 2K channels
(WIDTH); J an index head's width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend

_ELEMENTS = 4096
"""Elements of values that a program of 8 warps holds at once."""
_PARTS = 64
"""Partial sums of the gate bias's gradient."""


@triton.jit
def _slots(
    values,
    gates,
    ape,
    token,
    present,
    x,
    in_row,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    M: tl.constexpr,
):
    """Returns offsets, mask, values and biased gates (-inf where absent).

    Each is [BLOCK_C, M, BLOCK_X].
    """
    j = tl.arange(0, M)[None, :, None]
    column = OFFSET + x[None, None, :]
    at = (token[:, None, None] + j).to(tl.int64) * WIDTH + column
    mask = present[:, None, None] & (j >= 0) & in_row[None, None, :]
    value = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gates + at, mask=mask, other=0.0).to(tl.float32)
    gate += tl.load(ape + j * WIDTH + column, mask=in_row[None, None, :], other=0.0)
    return at, mask, value, tl.where(present[:, None, None], gate, float("-inf"))


@triton.jit(do_not_specialize=["count"])
def _forward(
    values,
    gates,
    ape,
    first_token,
    has_previous,
    pooled,
    count,
    DIM: tl.constexpr,
    M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * DIM if OVERLAP else DIM
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    in_bounds = c < count
    token = tl.load(first_token + c, mask=in_bounds, other=0)
    # Out-of-range windows load finite values; their results are masked at the store.
    _, _, value, gate = _slots(
        values, gates, ape, token, token >= 0, x, x < DIM, WIDTH, WIDTH - DIM, M
    )
    top = tl.max(gate, 1)
    if OVERLAP:
        present = tl.load(has_previous + c, mask=in_bounds, other=0) != 0
        before = tl.load(first_token + c - 1, mask=present, other=0)
        _, _, previous_value, previous_gate = _slots(
            values, gates, ape, before, present, x, x < DIM, WIDTH, 0, M
        )
        top = tl.maximum(top, tl.max(previous_gate, 1))
    weight = tl.exp(gate - top[:, None, :])
    total = tl.sum(weight, 1)
    out = tl.sum(weight * value, 1)
    if OVERLAP:
        weight = tl.exp(previous_gate - top[:, None, :])
        total += tl.sum(weight, 1)
        out += tl.sum(weight * previous_value, 1)
    at = c.to(tl.int64)[:, None] * DIM + x[None, :]
    tl.store(pooled + at, out / total, mask=in_bounds[:, None] & (x < DIM)[None, :])


@triton.jit
def _write_gradients(grad_values, grad_gates, at, mask, value, weight, out, grad):
    """Stores one half's gradients and returns that of the gates, [BLOCK_C, M, BLOCK_X]."""
    grad_value = weight * grad[:, None, :]
    grad_gate = grad_value * (value - out[:, None, :])
    tl.store(grad_values + at, grad_value.to(grad_values.dtype.element_ty), mask=mask)
    tl.store(grad_gates + at, grad_gate.to(grad_gates.dtype.element_ty), mask=mask)
    return grad_gate


@triton.jit(do_not_specialize=["count", "span"])
def _backward(
    values,
    gates,
    ape,
    first_token,
    has_previous,
    grad_pooled,
    grad_values,
    grad_gates,
    grad_ape,
    count,
    span,
    DIM: tl.constexpr,
    M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Computes the gradients of ``span`` windows, BLOCK_C at a time.

    Writes their partial sum [M, WIDTH] of the gradient of ape.
    """
    WIDTH: tl.constexpr = 2 * DIM if OVERLAP else DIM
    part = tl.program_id(0)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    own_ape = tl.zeros((M, BLOCK_X), tl.float32)
    previous_ape = tl.zeros((M, BLOCK_X), tl.float32)
    end = tl.minimum((part + 1) * span, count)
    for start in tl.range(part * span, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_bounds = c < end
        token = tl.load(first_token + c, mask=in_bounds, other=0)
        at, mask, value, gate = _slots(
            values, gates, ape, token, token >= 0, x, x < DIM, WIDTH, WIDTH - DIM, M
        )
        mask = mask & in_bounds[:, None, None]
        top = tl.max(gate, 1)
        if OVERLAP:
            present = tl.load(has_previous + c, mask=in_bounds, other=0) != 0
            before = tl.load(first_token + c - 1, mask=present, other=0)
            previous_at, previous_mask, previous_value, previous_gate = _slots(
                values, gates, ape, before, present, x, x < DIM, WIDTH, 0, M
            )
            top = tl.maximum(top, tl.max(previous_gate, 1))
        weight = tl.exp(gate - top[:, None, :])
        total = tl.sum(weight, 1)
        if OVERLAP:
            previous_weight = tl.exp(previous_gate - top[:, None, :])
            total += tl.sum(previous_weight, 1)
            previous_weight = previous_weight / total[:, None, :]
        weight = weight / total[:, None, :]
        out = tl.sum(weight * value, 1)
        if OVERLAP:
            out += tl.sum(previous_weight * previous_value, 1)
        row = c.to(tl.int64)[:, None] * DIM + x[None, :]
        grad = tl.load(grad_pooled + row, mask=in_bounds[:, None] & (x < DIM)[None, :], other=0.0)
        grad_gate = _write_gradients(grad_values, grad_gates, at, mask, value, weight, out, grad)
        own_ape += tl.sum(grad_gate, 0)
        if OVERLAP:
            grad_gate = _write_gradients(
                grad_values,
                grad_gates,
                previous_at,
                previous_mask,
                previous_value,
                previous_weight,
                out,
                grad,
            )
            previous_ape += tl.sum(grad_gate, 0)
    j = tl.arange(0, M)[:, None]
    at = grad_ape + (part * M + j) * WIDTH + x[None, :]
    in_row = (j >= 0) & (x < DIM)[None, :]
    tl.store(at + (WIDTH - DIM), own_ape, mask=in_row)
    if OVERLAP:
        tl.store(at, previous_ape, mask=in_row)


def pool_windows(
    values_TX: Tensor,
    gates_TX: Tensor,
    ape_mX: Tensor,
    first_token_C: Tensor,
    has_previous_C: Tensor,
    overlap: bool,
    *,
    block_x: int = 64,
) -> Tensor:
    """Computes ``model.kernels.compressor.pool_windows`` in Triton.

    Args:
        block_x: channels per program, a power of two.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or m.
        ValueError: m is not a power of two.
    """
    m = ape_mX.shape[0]
    backend.compressor(values_TX.device, values_TX.dtype, m)
    if m & (m - 1):
        raise ValueError(f"compress ratio {m}; Triton supports powers of two")
    return _Pool.apply(
        values_TX.contiguous(),
        gates_TX.contiguous(),
        ape_mX.float().contiguous(),
        first_token_C,
        has_previous_C.view(torch.int8),
        overlap,
        block_x,
    )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        gates: Tensor,
        ape: Tensor,
        first_token: Tensor,
        has_previous: Tensor,
        overlap: bool,
        block_x: int,
    ) -> Tensor:
        m, width = ape.shape
        dim, count = width // 2 if overlap else width, len(first_token)
        block_c = max(_ELEMENTS // (m * block_x), 1) if block_x >= 64 else 2
        pooled = torch.empty((count, dim), dtype=torch.float32, device=values.device)
        if count:
            _forward[(triton.cdiv(count, block_c), triton.cdiv(dim, block_x))](
                values,
                gates,
                ape,
                first_token,
                has_previous,
                pooled,
                count,
                DIM=dim,
                M=m,
                BLOCK_C=block_c,
                BLOCK_X=block_x,
                OVERLAP=overlap,
                num_warps=8,
            )
        ctx.save_for_backward(values, gates, ape, first_token, has_previous)
        ctx.overlap, ctx.block_x, ctx.block_c, ctx.dim = overlap, block_x, block_c, dim
        return pooled

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        values, gates, ape, first_token, has_previous = ctx.saved_tensors
        grad_values, grad_gates = values.new_zeros(2, *values.shape)
        count = len(first_token)
        blocks = triton.cdiv(count, ctx.block_c)
        span = max(triton.cdiv(blocks, _PARTS), 1) * ctx.block_c
        parts = triton.cdiv(count, span)
        grad_ape = torch.empty((parts, *ape.shape), dtype=torch.float32, device=ape.device)
        if count:
            _backward[(parts, triton.cdiv(ctx.dim, ctx.block_x))](
                values,
                gates,
                ape,
                first_token,
                has_previous,
                grad_pooled.float().contiguous(),
                grad_values,
                grad_gates,
                grad_ape,
                count,
                span,
                DIM=ctx.dim,
                M=ape.shape[0],
                BLOCK_C=ctx.block_c,
                BLOCK_X=ctx.block_x,
                OVERLAP=ctx.overlap,
                num_warps=8,
            )
        return grad_values, grad_gates, grad_ape.sum(0), None, None, None, None
