"""`syrk.syrk_` in Triton: one triangle is written twice, so the result is symmetric to the bit.

A program computes one block of one matrix. A matrix of R rows and C columns takes R²·C FLOPs, and
R·BLOCK·C more for the blocks on the diagonal, instead of 2·R²·C, and moves at least 2·R·(C + R)
bytes in bf16. Of the three matmuls of a Newton–Schulz step, with R²·C, R³ and R²·C multiplications,
the first two are symmetric: a step takes 2/3 of the FLOPs where R = C, and 7/10 where C = 2·R.

    minimum of a step at 989 TFLOP/s, R = C    both triangles   one    measured
    2048                                             52 us     35 us   not yet timed
    4096                                            417 us    278 us   not yet timed
    7168                                           2235 us   1490 us   not yet timed

A matrix of Flash's experts, 2048 x 4096, takes at least 87 us and 61 us.

Letters: R rows, C columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _syrk(
    a,
    add,
    out,
    rows,
    columns,
    matrix_stride,
    row_stride,
    column_stride,
    pairs,
    beta,
    alpha,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair = tl.program_id(0) % pairs
    matrix = (tl.program_id(0) // pairs).to(tl.int64)
    # pair = i (i + 1) / 2 + j with j <= i; the root, rounded as a GPU does it, may be off by one.
    i = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= pair, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > pair, i - 1, i)
    j = pair - i * (i + 1) // 2
    row = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    other = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    base = a + matrix * matrix_stride
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < columns)[None, :]
        at = row[:, None] * row_stride + k[None, :] * column_stride
        x = tl.load(base + at, mask=(row < rows)[:, None] & inside, other=0.0)
        at = other[:, None] * row_stride + k[None, :] * column_stride
        y = tl.load(base + at, mask=(other < rows)[:, None] & inside, other=0.0)
        acc = tl.dot(x, tl.trans(y), acc, input_precision="ieee")
    acc *= alpha
    start = matrix * rows * rows
    at = start + row[:, None] * rows + other[None, :]
    mask = (row < rows)[:, None] & (other < rows)[None, :]
    if ADD:
        acc += beta * tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
    value = acc.to(out.dtype.element_ty)
    # One triangle of a diagonal block as well, so that both are the same however it is rounded.
    tl.store(out + at, value, mask=mask & (row[:, None] >= other[None, :]))
    at = start + other[:, None] * rows + row[None, :]
    mask = (row < rows)[None, :] & (other[:, None] < row[None, :])
    tl.store(out + at, tl.trans(value), mask=mask)


def syrk_(
    out_NRR: Tensor,
    a_NRC: Tensor,
    add_NRR: Tensor | None,
    beta: float,
    alpha: float,
    *,
    block: int = 128,
    block_k: int = 64,
) -> Tensor:
    """Computes βC + αA·Aᵀ of each matrix into `out_NRR`; the same bits at every run.

    Args:
        out_NRR: contiguous.
        a_NRC: the matrices A, with any strides.
        add_NRR: the matrices C, symmetric and contiguous.
        block, block_k: rows and columns of a program's tiles, powers of two.
    """
    assert out_NRR.is_contiguous() and (add_NRR is None or add_NRR.is_contiguous())
    count, rows, columns = a_NRC.shape
    blocks = triton.cdiv(rows, block)
    pairs = blocks * (blocks + 1) // 2
    if out_NRR.numel():
        _syrk[(pairs * count,)](
            a_NRC,
            add_NRR,
            out_NRR,
            rows,
            columns,
            *a_NRC.stride(),
            pairs,
            beta,
            alpha,
            ADD=add_NRR is not None,
            BLOCK=block,
            BLOCK_K=block_k,
            num_warps=8,
            num_stages=3,
        )
    return out_NRR
