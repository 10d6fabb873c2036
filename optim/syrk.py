"""Symmetric products of matrices, which Newton–Schulz is made of: βC + αA·Aᵀ for symmetric C.

Plain PyTorch computes both triangles. The Triton kernel beside this computes one and writes it
twice, on GPUs from Hopper on and for 16-bit numbers, once a GPU has shown that it is right there.
"""

import torch
from torch import Tensor

COMPARED_ON_GPU = False
"""Whether tests/optim/test_syrk.py has passed on a GPU. Until then nothing trains with it."""


def product_(
    out_NRR: Tensor,
    a_NRC: Tensor,
    add_NRR: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """βC + αA·Aᵀ of each matrix into ``out_NRR``, which is neither of the inputs."""
    if COMPARED_ON_GPU and _fits(a_NRC):
        from optim import syrk_triton as symmetric_triton

        return symmetric_triton.product_(out_NRR, a_NRC, add_NRR, beta, alpha)
    if add_NRR is None:
        return torch.bmm(a_NRC, a_NRC.mT, out=out_NRR)
    return torch.baddbmm(add_NRR, a_NRC, a_NRC.mT, beta=beta, alpha=alpha, out=out_NRR)


def _fits(a_NRC: Tensor) -> bool:
    device = a_NRC.device
    return (
        device.type == "cuda"
        and a_NRC.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
