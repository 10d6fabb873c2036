"""QuACK's symmetric matmul."""

import torch


def gemm_symmetric(
    A, B, C=None, out=None, out_dtype=None, dynamic_scheduler=False, alpha=1.0, beta=1.0
):
    assert A.dtype in (torch.bfloat16, torch.float16) and A.data_ptr() == B.data_ptr()
    assert B.shape == A.mT.shape and B.stride() == A.mT.stride() and 1 in A.stride()
    assert isinstance(alpha, float) and isinstance(beta, float)
    assert all(size % 8 == 0 for size in A.shape[1:]) and out.is_contiguous()
    square = alpha * A.double() @ B.double()
    out.copy_(square if C is None else square + beta * C.double())
    return out
