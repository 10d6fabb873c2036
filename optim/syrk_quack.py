"""`syrk.syrk_` with QuACK's symmetric matmul (quack-kernels, optional).

It computes the tiles of one triangle and writes each twice, as `syrk_triton` does, through TMA and
with two warp groups that take turns. Its loads have 16 bytes: matrices with other rows or columns,
and those of other dtypes, are multiplied by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim import syrk

_MULTIPLE = 8


def syrk_(
    out_NRR: Tensor,
    a_NRC: Tensor,
    add_NRR: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Computes βC + αA·Aᵀ of each matrix into `out_NRR`, which is contiguous, as C is."""
    if not takes(a_NRC):
        return syrk.syrk_(out_NRR, a_NRC, add_NRR, beta, alpha)
    from quack.gemm_interface import gemm_symmetric

    # beta belongs to C, and whether it is 1 decides what is compiled.
    scales = {"alpha": float(alpha), "beta": 1.0 if add_NRR is None else float(beta)}
    gemm_symmetric(a_NRC, a_NRC.mT, C=add_NRR, out=out_NRR, **scales)
    return out_NRR


def takes(a_NRC: Tensor) -> bool:
    """Reports whether QuACK multiplies these matrices."""
    rows_or_columns_lie_together = 1 in a_NRC.stride()[1:]
    return (
        a_NRC.dtype in (torch.bfloat16, torch.float16)
        and rows_or_columns_lie_together
        and all(size > 0 and size % _MULTIPLE == 0 for size in a_NRC.shape[1:])
    )
