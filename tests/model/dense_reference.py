"""A window-only V4 block and the MTP head in a few dense lines of float64, one sample at a time.

Written from the report alone: whole [S, S] masks, loops over heads, tokens and experts. Nothing of
the model is used here but the names of its parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig

Parameters = dict[str, Tensor]


def rms(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    out = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight


def turn(x: Tensor, position: int, config: ModelConfig, sign: float = 1.0) -> Tensor:
    """Rotate adjacent pairs among the last dims of a vector by plain window-layer RoPE."""
    rotary = config.qk_rope_head_dim
    parts = list(x[: len(x) - rotary])
    for pair in range(rotary // 2):
        angle = sign * position * config.rope_theta ** (-2 * pair / rotary)
        a, b = x[len(x) - rotary + 2 * pair], x[len(x) - rotary + 2 * pair + 1]
        parts += [
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        ]
    return torch.stack(parts)


def window_attention(p: Parameters, x: Tensor, config: ModelConfig) -> Tensor:
    """x [S, D] of one sample; masks are whole matrices."""
    length, heads, dim = len(x), config.num_attention_heads, config.head_dim
    eps = config.rms_norm_eps
    kv = rms(x @ p["attn.wkv.weight"].T, eps, p["attn.kv_norm.weight"])
    kv = torch.stack([turn(kv[t], t, config) for t in range(length)])
    low = rms(x @ p["attn.wq_a.weight"].T, eps, p["attn.q_norm.weight"])
    q = rms((low @ p["attn.wq_b.weight"].T).view(length, heads, dim), eps)
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (s <= t) & (s > t - config.sliding_window)
    outputs = []
    for head in range(heads):
        q_head = torch.stack([turn(q[i, head], i, config) for i in range(length)])
        weight = torch.exp(q_head @ kv.T / math.sqrt(dim)) * visible
        weight = weight / (weight.sum(-1, keepdim=True) + torch.exp(p["attn.attn_sink"][head]))
        mixed = weight @ kv
        outputs.append(torch.stack([turn(mixed[i], i, config, -1.0) for i in range(length)]))
    groups, together = config.o_groups, heads // config.o_groups
    wo_a = p["attn.wo_a.weight"].view(groups, config.o_lora_rank, together * dim)
    low = [
        torch.cat(outputs[g * together : (g + 1) * together], -1) @ wo_a[g].T for g in range(groups)
    ]
    return torch.cat(low, -1) @ p["attn.wo_b.weight"].T


def expert(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float) -> Tensor:
    gate, up = torch.clamp(w1 @ x, max=limit), torch.clamp(w3 @ x, -limit, limit)
    return w2 @ (gate / (1 + torch.exp(-gate)) * up)


def experts(p: Parameters, x: Tensor, config: ModelConfig) -> Tensor:
    """x [S, D]: every token and expert on its own, with a learned router."""
    rows = []
    for row in x:
        score = torch.sqrt(F.softplus(p["ffn.gate.weight"] @ row))
        chosen = (score + p["ffn.gate.bias"]).sort(descending=True).indices
        chosen = chosen[: config.num_experts_per_tok].tolist()
        total = sum(score[e] for e in chosen)
        shared = [p[f"ffn.shared_experts.{w}.weight"] for w in ("w1", "w2", "w3")]
        out = expert(row, *shared, config.swiglu_limit)
        for e in chosen:
            matrices = [p[f"ffn.experts.{w}"][e] for w in ("w1", "w2", "w3")]
            weight = config.routed_scaling_factor * score[e] / total
            out = out + weight * expert(row, *matrices, config.swiglu_limit)
        rows.append(out)
    return torch.stack(rows)


def projections(p: Parameters, name: str, streams: Tensor, config: ModelConfig) -> Tensor:
    return rms(streams.flatten(1), config.rms_norm_eps) @ p[f"{name}.fn"].T


def through_streams(
    p: Parameters, name: str, streams: Tensor, config: ModelConfig, sublayer: str
) -> Tensor:
    """Hyper-connection around attention or experts; streams [S, N, D], token by token."""
    count, eps = config.hc_mult, config.hc_eps
    base, scale = p[f"{name}.base"], p[f"{name}.scale"]
    w = projections(p, name, streams, config)
    pre = torch.sigmoid(scale[0] * w[:, :count] + base[:count]) + eps
    post = 2 * torch.sigmoid(scale[1] * w[:, count : 2 * count] + base[count : 2 * count])
    combs = []
    for row in w[:, 2 * count :]:
        comb = (scale[2] * row + base[2 * count :]).view(count, count).softmax(-1) + eps
        comb = comb / (comb.sum(0, keepdim=True) + eps)
        for _ in range(config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(1, keepdim=True) + eps)
            comb = comb / (comb.sum(0, keepdim=True) + eps)
        combs.append(comb)
    x = sum(pre[:, j, None] * streams[:, j] for j in range(count))
    if sublayer == "attn":
        y = window_attention(p, rms(x, config.rms_norm_eps, p["attn_norm.weight"]), config)
    else:
        y = experts(p, rms(x, config.rms_norm_eps, p["ffn_norm.weight"]), config)
    out = []
    for k in range(count):
        carried = sum(
            torch.stack([comb[j, k] for comb in combs])[:, None] * streams[:, j]
            for j in range(count)
        )
        out.append(post[:, k, None] * y + carried)
    return torch.stack(out, 1)


def mtp_nll(
    p: Parameters, streams: Tensor, tokens: Tensor, predicted: Tensor, config: ModelConfig
) -> Tensor:
    """Sum over i of -log p(predicted[i]) for one sample.

    Args:
        p: the MTP block's parameters without ``mtp.0.``, and ``embed`` and ``head``.
        streams: [n, N, D] of the main model at positions i = 0..n-1.
        tokens: [n], t_{i+1}.
        predicted: [n], t_{i+2}.
    """
    eps = config.rms_norm_eps
    embedded = p["embed"][tokens]
    e = rms(embedded, eps, p["enorm.weight"]) @ p["e_proj.weight"].T
    h = rms(streams, eps, p["hnorm.weight"]) @ p["h_proj.weight"].T
    x = torch.stack([e + h[:, j] for j in range(config.hc_mult)], 1)
    x = through_streams(p, "hc_attn", x, config, "attn")
    x = through_streams(p, "hc_ffn", x, config, "ffn")
    w = projections(p, "hc_head", x, config)
    read = torch.sigmoid(p["hc_head.scale"] * w + p["hc_head.base"]) + config.hc_eps
    hidden = sum(read[:, j, None] * x[:, j] for j in range(config.hc_mult))
    logits = rms(hidden, eps, p["norm.weight"]) @ p["head"].T
    return -logits.log_softmax(-1)[torch.arange(len(predicted)), predicted].sum()
