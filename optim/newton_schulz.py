"""The nearest semi-orthogonal matrix by Newton–Schulz iterations of degree 5.

Each step maps every singular value s to a·s + b·s³ + c·s⁵ and keeps the singular vectors. Two
published lists of coefficients are implemented:

- hybrid (the Muon section of the V4 report, arXiv 2606.19348): coarse steps lift small values fast
  but only to somewhere around 1; fine steps then converge to 1.
- Polar Express (arXiv 2505.16932, Algorithm 1): every step has the best polynomial for the interval
  that the previous step maps to, from singular values of 1e-3 upwards.

Letters: N matrices of R rows and C columns.
"""

import torch
from torch import Tensor

from optim.syrk import Syrk, syrk_

Step = tuple[float, float, float]

COARSE: Step = (3.4445, -4.7750, 2.0315)
FINE: Step = (2.0, -1.5, 0.5)
POLAR_EXPRESS: tuple[Step, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS_LIMIT: Step = (1.875, -1.25, 0.375)
"""Coefficients of all later steps."""
POLAR_EXPRESS_SAFETY = 1.01
"""Divides singular values: rounding may push one above 1, where early polynomials diverge."""
GRAM_RESTART = 2
"""Steps on one Gram matrix. Squaring loses small singular values to rounding, and the error grows
with every step on one Gram matrix until a negative eigenvalue diverges; a new Gram matrix has the
error of one rounding (Dao AI Lab, Gram Newton–Schulz, 2026)."""


def hybrid_steps(coarse: int = 8, fine: int = 2) -> tuple[Step, ...]:
    """Returns V4's coefficients, one entry for each step."""
    return (COARSE,) * coarse + (FINE,) * fine


def polar_express_steps(steps: int) -> tuple[Step, ...]:
    """Returns the published coefficients of the first `steps`, with the published safety factor."""
    safe = [
        (a / POLAR_EXPRESS_SAFETY, b / POLAR_EXPRESS_SAFETY**3, c / POLAR_EXPRESS_SAFETY**5)
        for a, b, c in POLAR_EXPRESS
    ]
    return tuple((safe + [POLAR_EXPRESS_LIMIT] * steps)[:steps])


def newton_schulz(
    matrices_NRC: Tensor,
    steps: tuple[Step, ...] = hybrid_steps(),
    dtype: torch.dtype = torch.float32,
    gram: bool = False,
    syrk: Syrk = syrk_,
) -> Tensor:
    """Computes U·Vᵀ of each matrix U·S·Vᵀ.

    With V4's steps singular values end in [0.999, 1.001] in fp32 and about [0.993, 1.007] in bf16,
    if they were at least about 1e-4 of the matrix's Frobenius norm. A zero matrix stays zero. The
    scale of the input does not matter. A matrix's result does not depend on the others in the
    stack. Not differentiable.

    Args:
        matrices_NRC: [N, R, C] or [R, C], of any floating dtype.
        steps: the coefficients (a, b, c) of each iteration.
        dtype: of the iterations and of the result.
        gram: iterates on Gram matrices where the longer side is at least twice the shorter one:
            the same in exact arithmetic, with fewer FLOPs.
        syrk: computes the symmetric matmuls of other iterations.

    Returns:
        The shape of `matrices_NRC`, in `dtype`.
    """
    if matrices_NRC.dim() == 2:
        return newton_schulz(matrices_NRC[None], steps, dtype, gram, syrk)[0]
    if matrices_NRC.size(1) > matrices_NRC.size(2):  # so that the Gram matrix is the smaller one
        return newton_schulz(matrices_NRC.mT, steps, dtype, gram, syrk).mT
    with torch.no_grad():
        x_NRC = _unit_norm(matrices_NRC).to(dtype)
        if gram and matrices_NRC.size(2) >= 2 * matrices_NRC.size(1):
            return _on_gram(x_NRC, steps)
        return _on_matrices(x_NRC, steps, syrk)


def _on_matrices(x_NRC: Tensor, steps: tuple[Step, ...], syrk: Syrk) -> Tensor:
    """Runs the iterations with three matmuls each, in four buffers."""
    other_NRC = torch.empty_like(x_NRC)
    gram_NRR = x_NRC.new_empty(x_NRC.size(0), x_NRC.size(1), x_NRC.size(1))
    polynomial_NRR = torch.empty_like(gram_NRR)
    for a, b, c in steps:
        syrk(gram_NRR, x_NRC, None, 0.0, 1.0)
        syrk(polynomial_NRR, gram_NRR, gram_NRR, b, c)
        torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=a, out=other_NRC)
        x_NRC, other_NRC = other_NRC, x_NRC
    return x_NRC


def _on_gram(x_NRC: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """Runs the iterations on Gram matrices: P = aI + bG + cG² gives G ← PGP and X ← PX.

    The matrices P of GRAM_RESTART steps are multiplied first, then X by them; then G is computed
    again from X.
    """
    for first in range(0, len(steps), GRAM_RESTART):
        group = steps[first : first + GRAM_RESTART]
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        product_NRR = None
        for index, (a, b, c) in enumerate(group):
            polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            polynomial_NRR.diagonal(dim1=1, dim2=2).add_(a)
            if index + 1 < len(group):
                gram_NRR = polynomial_NRR @ gram_NRR @ polynomial_NRR
            product_NRR = (
                polynomial_NRR if product_NRR is None else torch.bmm(polynomial_NRR, product_NRR)
            )
        if product_NRR is not None:
            x_NRC = torch.bmm(product_NRR, x_NRC)
    return x_NRC


def _unit_norm(matrices_NRC: Tensor) -> Tensor:
    """Divides each matrix by its Frobenius norm, into a new fp32 tensor.

    Dividing by the largest entry first keeps squares of tiny gradients from underflowing; the norm
    is then at least 1 unless the matrix is zero, so no eps is needed.
    """
    largest_N11 = torch.linalg.vector_norm(
        matrices_NRC.float(), torch.inf, dim=(1, 2), keepdim=True
    )
    x_NRC = matrices_NRC / largest_N11.clamp_min(torch.finfo(torch.float32).tiny)
    return x_NRC.div_(torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True).clamp_min(1.0))
