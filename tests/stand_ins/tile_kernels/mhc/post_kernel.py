"""Writing the residual streams, forward and backward."""

import torch


def mhc_post_fwd(x, residual, post_layer_mix, comb_res_mix, out=None):
    assert x.dtype == residual.dtype == torch.bfloat16
    assert post_layer_mix.dtype == comb_res_mix.dtype == torch.float32
    assert x.shape == (*residual.shape[:2], residual.shape[3])
    assert post_layer_mix.shape == (*residual.shape[:3], 1)
    assert comb_res_mix.shape == (*residual.shape[:3], residual.shape[2])
    assert all(t.is_contiguous() for t in (x, post_layer_mix, comb_res_mix))
    mixed = torch.einsum("abmn,abmc->abnc", comb_res_mix, residual.float())
    return (x.float()[:, :, None] * post_layer_mix + mixed).bfloat16()


def mhc_post_bwd(x, residual, post_layer_mix, comb_res_mix, d_o, fuse_grad_acc=True):
    assert not fuse_grad_acc
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, residual, post_layer_mix, comb_res_mix)]
        return torch.autograd.grad(mhc_post_fwd(*leaves), leaves, d_o)
