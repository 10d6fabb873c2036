"""The shape of every trained parameter, without building a model. Imports no torch."""

from __future__ import annotations

import re

from model.config import LayerType, ModelConfig

Shapes = dict[str, tuple[int, ...]]

_FP32 = re.compile(r".*(?:norm\.weight|hc_\w+|\.attn_sink|\.ape)")


def always_fp32(name: str) -> bool:
    """Whether a parameter is in fp32 in a model of any precision."""
    return _FP32.fullmatch(name) is not None


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Shapes by name, those of ``V4Model(config).named_parameters()``."""
    vocab, dim = config.vocab_size, config.hidden_size
    shapes: Shapes = {
        "embed.weight": (vocab, dim),
        "norm.weight": (dim,),
        "head.weight": (vocab, dim),
    }
    shapes |= _hyper("hc_head", config, config.hc_mult, 1)
    for row, kind in enumerate(config.layer_types):
        shapes |= _block(f"layers.{row}.", config, kind)
    for row in range(config.num_nextn_predict_layers):
        mtp = f"mtp.{row}."
        shapes |= _block(mtp, config, "window") | _hyper(f"{mtp}hc_head", config, config.hc_mult, 1)
        shapes |= {f"{mtp}{name}.weight": (dim, dim) for name in ("e_proj", "h_proj")}
        shapes |= {f"{mtp}{name}.weight": (dim,) for name in ("enorm", "hnorm", "norm")}
    return shapes


def _block(prefix: str, config: ModelConfig, kind: LayerType) -> Shapes:
    dim, experts = config.hidden_size, config.n_routed_experts
    inner = config.moe_intermediate_size
    shared = inner * config.n_shared_experts
    mixing = (2 + config.hc_mult) * config.hc_mult
    shapes: Shapes = {
        f"{prefix}attn_norm.weight": (dim,),
        f"{prefix}ffn_norm.weight": (dim,),
        f"{prefix}ffn.gate.weight": (experts, dim),
        f"{prefix}ffn.experts.w1": (experts, inner, dim),
        f"{prefix}ffn.experts.w2": (experts, dim, inner),
        f"{prefix}ffn.experts.w3": (experts, inner, dim),
        f"{prefix}ffn.shared_experts.w1.weight": (shared, dim),
        f"{prefix}ffn.shared_experts.w2.weight": (dim, shared),
        f"{prefix}ffn.shared_experts.w3.weight": (shared, dim),
    }
    for name in ("hc_attn", "hc_ffn"):
        shapes |= _hyper(f"{prefix}{name}", config, mixing, 3)
    return shapes | _attention(f"{prefix}attn.", config, kind)


def _attention(prefix: str, config: ModelConfig, kind: LayerType) -> Shapes:
    dim, rank, width = config.hidden_size, config.q_lora_rank, config.head_dim
    inner, outer = config.num_attention_heads * width, config.o_groups * config.o_lora_rank
    shapes: Shapes = {
        f"{prefix}wq_a.weight": (rank, dim),
        f"{prefix}q_norm.weight": (rank,),
        f"{prefix}wq_b.weight": (inner, rank),
        f"{prefix}wkv.weight": (width, dim),
        f"{prefix}kv_norm.weight": (width,),
        f"{prefix}wo_a.weight": (outer, inner // config.o_groups),
        f"{prefix}wo_b.weight": (dim, outer),
        f"{prefix}attn_sink": (config.num_attention_heads,),
    }
    if kind != "window":
        shapes |= _compressor(f"{prefix}compressor.", config, kind, width)
    if kind == "csa":
        heads, index = config.index_n_heads, config.index_head_dim
        shapes[f"{prefix}indexer.wq_b.weight"] = (heads * index, rank)
        shapes[f"{prefix}indexer.weights_proj.weight"] = (heads, dim)
        shapes |= _compressor(f"{prefix}indexer.compressor.", config, kind, index)
    return shapes


def _compressor(prefix: str, config: ModelConfig, kind: LayerType, width: int) -> Shapes:
    both = 2 * width if kind == "csa" else width
    return {
        f"{prefix}wkv.weight": (both, config.hidden_size),
        f"{prefix}wgate.weight": (both, config.hidden_size),
        f"{prefix}ape": (config.compress_ratio(kind), both),
        f"{prefix}norm.weight": (width,),
    }


def _hyper(name: str, config: ModelConfig, rows: int, scales: int) -> Shapes:
    columns = config.hc_mult * config.hidden_size
    return {f"{name}_fn": (rows, columns), f"{name}_base": (rows,), f"{name}_scale": (scales,)}
