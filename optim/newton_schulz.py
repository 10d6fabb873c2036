"""The nearest semi-orthogonal matrix by the hybrid Newton–Schulz iteration.

Source of the steps and coefficients: the Muon section of the V4 report, arXiv 2606.19348.
Letters: N matrices, R rows, C columns. Each step maps every singular value s to
a·s + b·s³ + c·s⁵ and leaves the singular vectors alone. Coarse steps lift small values fast but
only to somewhere around 1; fine steps then converge to 1.
"""

import torch
from torch import Tensor

COARSE = (3.4445, -4.7750, 2.0315)
FINE = (2.0, -1.5, 0.5)


def newton_schulz(
    matrices_NRC: Tensor,
    coarse_steps: int = 8,
    fine_steps: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ: [N, R, C] (or [R, C]) in, the same shape out, in `dtype`.

    Singular values end in [0.999, 1.001] in fp32 and about [0.993, 1.007] in bf16, if they were at
    least about 1e-4 of the matrix's Frobenius norm. A zero matrix stays zero. The scale of the
    input does not matter. Each matrix is treated alone, however many are given.
    """
    if matrices_NRC.dim() == 2:
        return newton_schulz(matrices_NRC[None], coarse_steps, fine_steps, dtype)[0]
    if matrices_NRC.size(1) > matrices_NRC.size(2):  # the Gram matrix shall be the small one
        return newton_schulz(matrices_NRC.mT, coarse_steps, fine_steps, dtype).mT
    x_NRC = _unit_norm(matrices_NRC).to(dtype)
    for a, b, c in [COARSE] * coarse_steps + [FINE] * fine_steps:
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=a)
    return x_NRC


def _unit_norm(matrices_NRC: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm, in fp32.

    Dividing by the largest entry first keeps squares of tiny gradients from vanishing; after it
    the norm is at least 1 unless the matrix is zero, so no eps distorts anything.
    """
    x_NRC = matrices_NRC.float()
    largest_N11 = x_NRC.abs().amax(dim=(1, 2), keepdim=True)
    x_NRC = x_NRC / largest_N11.clamp_min(torch.finfo(torch.float32).tiny)
    return x_NRC / torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True).clamp_min(1.0)
