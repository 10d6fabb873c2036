"""What one more token costs at inference, against its context: operations, and bytes of cache.

For a V4 model, for DeepSeek-V3.2, and for grouped-query attention (GQA) in a model of the same
width and depth. The report (Figure 1) counts operations as equivalent FP8 FLOPs, in which a
multiplication and an addition in bf16 count twice and in FP4 half. With `EQUIVALENT_FP8` the
formulas here give its figures for 1M tokens: 27% and 10% of V3.2's operations, 10% and 7% of its
cache. Imports no torch.

Sources: report §2 and §3.4 (V4); the released config.json and inference code of V3.2; FlashMLA's
layout of V3.2's cache.

Letters as in model/config.py: D hidden size, H heads, K head dim, R rotary dims, Q, O, G ranks and
groups of projections, I and J heads and width of the indexer, E experts, W window, m tokens of an
entry, n tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model.cache.sizes import cache_bytes
from model.config import LayerType, ModelConfig

Format = Literal["bf16", "fp8", "fp4"]
"""Format of a matmul's operands. Experts' FP4 weights are multiplied as FP8 (report §3.4)."""

EQUIVALENT_FP8: Mapping[Format, float] = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
"""FLOPs of FP8 in the time of one FLOP, on hardware whose rate doubles as the width halves."""
PLAIN: Mapping[Format, float] = {"bf16": 1.0, "fp8": 1.0, "fp4": 1.0}


@dataclass(frozen=True)
class Operations:
    """FLOPs of one token, by part of the model and format of the operands."""

    by_part: Mapping[tuple[str, Format], float]

    def total(self, weights: Mapping[Format, float] = EQUIVALENT_FP8) -> float:
        """Returns the sum, each format's FLOPs multiplied by its weight."""
        return sum(weights[kind] * flops for (_, kind), flops in self.by_part.items())


def v4_operations(config: ModelConfig, n: int) -> Operations:
    """Returns the operations of a V4 model for the token after n - 1 others, without MTP."""
    d, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    q, index = config.q_lora_rank, config.index_n_heads * config.index_head_dim
    layers = config.num_hidden_layers
    count = {kind: config.layer_types.count(kind) for kind in ("window", "csa", "hca")}
    entries = {kind: visible_entries(config, kind, n) for kind in ("window", "csa", "hca")}
    attended = {
        "window": 0,
        "csa": min(entries["csa"], config.index_topk),
        "hca": entries["hca"],
    }
    window = min(n, config.sliding_window)

    projections = d * q + q * inner + d * config.head_dim
    projections += inner * config.o_lora_rank + config.o_groups * config.o_lora_rank * d
    compressors = 2 * d * config.head_dim * (2 * count["csa"] + count["hca"])
    experts = config.num_experts_per_tok + config.n_shared_experts
    streams = config.hc_mult
    index_inputs = d * config.index_n_heads + 4 * d * config.index_head_dim
    pairs = sum(count[kind] * (window + attended[kind]) for kind in count)
    return _operations(
        {
            ("projections", "fp8"): layers * projections,
            ("compressors", "bf16"): compressors,
            ("attention", "bf16"): 2 * inner * pairs,
            ("indexer", "fp8"): count["csa"] * q * index,
            ("indexer", "bf16"): count["csa"] * index_inputs,
            ("indexer", "fp4"): count["csa"] * index * entries["csa"],
            ("experts", "fp8"): layers * 3 * d * config.moe_intermediate_size * experts,
            ("router", "bf16"): layers * d * config.n_routed_experts,
            ("hyper-connections", "bf16"): layers * 2 * d * (2 + streams) * streams**2,
            ("output head", "bf16"): d * config.vocab_size,
        }
    )


def visible_entries(config: ModelConfig, kind: LayerType, n: int) -> int:
    """Returns the compressed entries that the last of n tokens sees."""
    ratio = config.compress_ratio(kind)
    return n // ratio if ratio else 0


def v32_operations(n: int) -> Operations:
    """Returns the operations of DeepSeek-V3.2 for the token after n - 1 others, without MTP.

    Latent attention is in its absorbed form, in which all heads share the latent keys.
    """
    d, layers, dense, heads, latent, rotary = 7168, 61, 3, 128, 512, 64
    head, q, index_heads, index_width, topk = 128, 1536, 64, 128, 2048
    projections = d * q + q * heads * (head + rotary) + d * (latent + rotary) + heads * head * d
    experts = (layers - dense) * 3 * d * 2048 * (8 + 1) + dense * 3 * d * 18432
    pairs = layers * min(n, topk)
    return _operations(
        {
            ("projections", "fp8"): layers * projections,
            ("projections", "bf16"): layers * heads * head * latent * 2,  # absorbed: kv_b
            ("attention", "bf16"): heads * (2 * latent + rotary) * pairs,
            ("indexer", "fp8"): layers * (q * index_heads + d) * index_width
            + layers * index_heads * index_width * n,
            ("indexer", "bf16"): layers * d * index_heads,
            ("experts", "fp8"): experts,
            ("router", "bf16"): (layers - dense) * d * 256,
            ("output head", "bf16"): d * 129280,
        }
    )


def gqa_operations(config: ModelConfig, n: int) -> Operations:
    """Returns the operations of the config with grouped-query attention in all its layers.

    As many query heads, of `GQA_HEAD_DIM` dims, and `GQA_HEADS` heads of keys and values; experts,
    router and output head are the config's. Keys and values are in bf16.
    """
    d, inner = config.hidden_size, config.num_attention_heads * GQA_HEAD_DIM
    layers = config.num_hidden_layers
    kept = ("experts", "router", "output head")
    parts = {key: x / 2 for key, x in v4_operations(config, n).by_part.items() if key[0] in kept}
    projections = 2 * d * inner + 2 * d * GQA_HEADS * GQA_HEAD_DIM
    parts["projections", "fp8"] = layers * projections
    parts["attention", "bf16"] = layers * 2 * inner * n
    return _operations(parts)


GQA_HEADS, GQA_HEAD_DIM = 8, 128
"""Grouped-query attention with which the report compares the cache: bf16, 8 heads of 128."""


def v4_cache_bytes(config: ModelConfig, n: int) -> int:
    """Returns the bytes of a V4 sequence of n tokens, packed as inference stores it."""
    return sum(cache_bytes(config, n, 2, packed=True).values())


def v32_cache_bytes(n: int) -> int:
    """Returns the bytes of V3.2: 512 dims in FP8 with a scale per 128, 64 rotary dims in bf16.

    The indexer's keys are 128 dims in FP8 with one fp32 scale.
    """
    return n * 61 * ((512 + 4 * 4 + 64 * 2) + (128 + 4))


def gqa_cache_bytes(config: ModelConfig, n: int) -> int:
    """Returns the bytes of grouped-query attention in all layers of the config, in bf16."""
    return n * config.num_hidden_layers * 2 * GQA_HEADS * GQA_HEAD_DIM * 2


def _operations(multiplications: Mapping[tuple[str, Format], float]) -> Operations:
    return Operations({key: 2.0 * count for key, count in multiplications.items()})
