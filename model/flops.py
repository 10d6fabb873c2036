"""FLOPs of the model's matmuls, counted from its sizes.

A multiplication and an addition are two FLOPs. Attention and experts run once per token, not once
per residual stream; a query counts the tokens and entries that it sees, so that packed rows cost
what their samples cost. Recomputation does not count.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from model.config import AttentionMode, LayerType, ModelConfig


def training_flops(
    config: ModelConfig,
    sample_lengths: Iterable[int],
    mtp: bool = True,
    attention: AttentionMode = "select",
) -> float:
    """Returns the FLOPs of forward and backward over samples of these lengths.

    Backward costs twice the forward. An indexer without a loss costs only its forward; during
    indexer warm-up everything else costs only its forward.
    """
    total = 0.0
    for length in sample_lengths:
        layers, output = flops_per_layer(config, int(length), mtp, attention)
        total += sum(layers) + output
    return total


def flops_per_layer(
    config: ModelConfig, length: int, mtp: bool = True, attention: AttentionMode = "select"
) -> tuple[list[float], float]:
    """Returns the FLOPs of forward and backward over one sample: of each layer, and of the output.

    The output is the head and, with ``mtp``, the MTP block with its own pass through the head.
    """
    position = np.arange(length)
    mtp = mtp and config.num_nextn_predict_layers > 0

    # Multiples of the forward's FLOPs: 1 where there is no backward, else 3.
    multiple = 1 if attention == "warmup" else 3
    trains_indexers = attention in ("warmup", "sparse")

    def block(kind: LayerType) -> float:
        pairs = _attended_entries(config, kind, position, attention in ("dense", "warmup"))
        total = multiple * _layer_flops(config, kind, position, pairs)
        if kind == "csa" and attention != "dense":
            total += (3 if trains_indexers else 1) * _indexer_flops(config, position)
        # The KL target recomputes q·k for every head and attended entry.
        if kind == "csa" and trains_indexers:
            total += 2.0 * config.num_attention_heads * config.head_dim * pairs
        return total

    # Each head first collapses the streams, then multiplies by the output matrix.
    per_head = (config.hc_mult + 1) * config.hc_mult + config.vocab_size
    output = multiple * (1 + mtp) * length * 2.0 * config.hidden_size * per_head
    if mtp:
        projections = config.hidden_size**2 * (1 + config.hc_mult)
        output += multiple * length * 2 * projections + block("window")
    return [block(kind) for kind in config.layer_types], output


def _attended_entries(
    config: ModelConfig, kind: LayerType, position: np.ndarray, dense: bool
) -> float:
    """Returns the number of (query, entry) pairs in which the query attends to the entry."""
    ratio = config.compress_ratio(kind)
    if not ratio:
        return 0.0
    entries = (position + 1) // ratio
    is_sparse = kind == "csa" and not dense
    return float((np.minimum(entries, config.index_topk) if is_sparse else entries).sum())


def _layer_flops(
    config: ModelConfig, kind: LayerType, position: np.ndarray, attended_entries: float
) -> float:
    dim, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    ratio = config.compress_ratio(kind)
    attention = dim * config.q_lora_rank + config.q_lora_rank * inner + dim * config.head_dim
    attention += inner * config.o_lora_rank + config.o_groups * config.o_lora_rank * dim
    if ratio:
        attention += 2 * dim * config.head_dim * (2 if kind == "csa" else 1)
    moe = dim * config.n_routed_experts  # router
    moe += (
        3
        * dim
        * config.moe_intermediate_size
        * (config.num_experts_per_tok + config.n_shared_experts)
    )
    streams = config.hc_mult
    mixing = 2 * dim * ((2 + streams) * streams * streams + streams + streams + streams**2)
    attended = float(np.minimum(position + 1, config.sliding_window).sum())
    attended += attended_entries
    return 2.0 * (len(position) * (attention + moe + mixing) + 2 * inner * attended)


def _indexer_flops(config: ModelConfig, position: np.ndarray) -> float:
    width = config.index_n_heads * config.index_head_dim
    projections = config.q_lora_rank * width + config.hidden_size * config.index_n_heads
    projections += 4 * config.hidden_size * config.index_head_dim
    scored = float(((position + 1) // config.csa_compress_ratio).sum())
    return 2.0 * (len(position) * projections + (width + config.index_n_heads) * scored)
