"""Symmetric matmuls of Newton–Schulz (BLAS's syrk): βC + αA·Aᵀ for symmetric C.

PyTorch's matmul computes both triangles. The Triton kernel (syrk_triton.py) computes one and writes
it twice, for 16-bit numbers.

Letters: N matrices of R rows and C columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Syrk = Callable[[Tensor, Tensor, Tensor | None, float, float], Tensor]
"""A function with the arguments and the result of `syrk_`."""


def syrk_(
    out_NRR: Tensor,
    a_NRC: Tensor,
    add_NRR: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Computes βC + αA·Aᵀ of each matrix into `out_NRR`.

    Args:
        out_NRR: the result, which must not overlap with the inputs.
        a_NRC: the matrices A.
        add_NRR: the symmetric matrices C; none where `beta` is 0.
    """
    if add_NRR is None:
        return torch.bmm(a_NRC, a_NRC.mT, out=out_NRR)
    return torch.baddbmm(add_NRR, a_NRC, a_NRC.mT, beta=beta, alpha=alpha, out=out_NRR)
