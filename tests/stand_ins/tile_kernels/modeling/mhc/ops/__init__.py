"""What reading the residual streams is made of; all tensors have two leading dimensions."""

import torch


def mhc_pre_norm_fn(
    residual, mhc_fn, mhc_norm_weight, mhc_norm_eps, fuse_grad_acc=True, n_splits=16
):
    assert residual.dtype == torch.bfloat16 and mhc_fn.dtype == torch.float32
    assert mhc_norm_weight is None and not fuse_grad_acc
    assert mhc_fn.shape == (24, residual.shape[2] * residual.shape[3])
    x = residual.flatten(2).float()
    rstd = (x.square().mean(-1, keepdim=True) + mhc_norm_eps).rsqrt()
    return x @ mhc_fn.t() * rstd


def mhc_pre_split_mixes(
    input_mixes, mhc_scale, mhc_base, mhc_mult, mhc_post_mult_value, mhc_pre_eps
):
    assert input_mixes.ndim == 3 and mhc_scale.shape == (3,) and mhc_base.shape == (24,)
    sizes = [mhc_mult, mhc_mult, mhc_mult * mhc_mult]
    parts = zip(input_mixes.split(sizes, -1), mhc_scale, mhc_base.split(sizes), strict=True)
    pre, post, comb = [mix * scale + base for mix, scale, base in parts]
    pre, post = pre.sigmoid() + mhc_pre_eps, post.sigmoid() * mhc_post_mult_value
    return pre[..., None], post[..., None], comb.unflatten(-1, (mhc_mult, mhc_mult))


def mhc_head_compute_mix(input_mix, mhc_scale, mhc_base, mhc_pre_eps):
    assert input_mix.ndim == 3 and input_mix.is_contiguous() and mhc_scale.shape == (1,)
    return (input_mix * mhc_scale + mhc_base).sigmoid() + mhc_pre_eps


def sinkhorn_normalize(x, repeat=10, eps=1e-6):
    x = x.softmax(-1) + eps
    x = x / (x.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        x = x / (x.sum(-1, keepdim=True) + eps)
        x = x / (x.sum(-2, keepdim=True) + eps)
    return x


def mhc_pre_apply_mix(x, mix, out=None):
    assert mix.shape == (*x.shape[:-1], 1)
    return (x.float() * mix).sum(-2).bfloat16()
