"""FlashMLA's sparse forward: out, the largest logits and the log-sum-exp without the sink."""

import torch


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    assert q.dtype == kv.dtype and indices.dtype == torch.int32
    assert q.shape[1] in (64, 128) and q.shape[2] == kv.shape[2] == d_v == 512
    assert kv.shape[1] == indices.shape[1] == 1 and indices.shape[2] % 128 == 0
    assert attn_sink.dtype == torch.float32 and attn_sink.shape == q.shape[1:2]
    assert all(x.stride(-1) == 1 for x in (q, kv, indices, attn_sink)) and topk_length is None
    index = indices[:, 0].long()
    missing = (index < 0) | (index >= len(kv))
    keys = kv[index.masked_fill(missing, 0), 0].double()
    logits = torch.einsum("thk,tnk->thn", q.double(), keys) * sm_scale
    logits = logits.masked_fill(missing[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    p = (logits - torch.logaddexp(lse, attn_sink.double())[..., None]).exp()
    out = torch.einsum("thn,tnk->thk", p, keys)
    return out.to(q.dtype), logits.amax(-1).float(), lse.float()
