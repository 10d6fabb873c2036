"""Symmetric matmuls of Newton–Schulz (BLAS's syrk): βC + αA·Aᵀ for symmetric C.

PyTorch's matmul computes both triangles. The Triton kernel (syrk_triton.py) computes one and writes
it twice, for 16-bit numbers on GPUs from Hopper on, once its test has passed on a GPU.

Letters: N matrices of R rows and C columns.
"""

import torch
from torch import Tensor

COMPARED_ON_GPU = False
"""Whether tests/optim/test_syrk.py has passed on a GPU. Until then nothing trains with it."""


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
    if COMPARED_ON_GPU and _fits(a_NRC):
        from optim import syrk_triton

        return syrk_triton.syrk_(out_NRR, a_NRC, add_NRR, beta, alpha)
    if add_NRR is None:
        return torch.bmm(a_NRC, a_NRC.mT, out=out_NRR)
    return torch.baddbmm(add_NRR, a_NRC, a_NRC.mT, beta=beta, alpha=alpha, out=out_NRR)


def _fits(a_NRC: Tensor) -> bool:
    """Whether the kernel takes the matrices."""
    device = a_NRC.device
    return (
        device.type == "cuda"
        and a_NRC.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
