"""An upper bound of the tokens per second and GPU that a model decodes: the roofline of a GPU.

All GPUs of a group share the weights, and as many sequences are decoded together as their memory
holds. A step takes the longer of reading weights and caches and of computing; communication, and
anything that a kernel loses, is not counted. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.cache.sizes import index_row_bytes, kv_row_bytes
from model.config import ModelConfig
from model.parameters import parameter_counts
from trainer.planning.efficiency import (
    EQUIVALENT_FP8,
    PLAIN,
    v4_cache_bytes,
    v4_operations,
    visible_entries,
)

USABLE = 0.9
"""Share of a GPU's memory for weights and caches."""
MXFP4_BYTES = 4.25 / 8
"""Bytes of an expert's weight: 4 bits, and 8 bits of scale for 32 of them."""


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of a GPU.

    Attributes:
        memory: [GB].
        bandwidth: of the memory. [TB/s]
        matmuls: dense, in FP8, or in bf16 where it has no FP8. [TFLOP/s]
        has_fp8: whether FP8 matmuls are faster than those in bf16.
    """

    memory: float
    bandwidth: float
    matmuls: float
    has_fp8: bool = True


GPUS = {
    "a100": Gpu(80, 2.04, 312, has_fp8=False),
    "h100": Gpu(80, 3.35, 1979),
    "h200": Gpu(141, 4.8, 1979),
    "b200": Gpu(180, 7.7, 4500),
}
"""SXM boards, by the maker's data sheets."""


@dataclass(frozen=True)
class DecodeRate:
    """Decoding at one length of context.

    Attributes:
        gpus: of the group that shares the weights.
        sequences: decoded together.
        tokens_per_second: of a GPU.
        bound: what a step waits for, "memory" or "compute".
    """

    gpus: int
    sequences: int
    tokens_per_second: float
    bound: str


def decode_rate(config: ModelConfig, gpu: Gpu, context: int) -> DecodeRate:
    """Returns the bound for sequences of `context` tokens each, without MTP."""
    counts = parameter_counts(config)
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.n_routed_experts
    expert_bytes = config.num_hidden_layers * experts * MXFP4_BYTES
    other_bytes = counts.main - config.num_hidden_layers * experts  # in FP8
    usable, cache = USABLE * gpu.memory * 1e9, v4_cache_bytes(config, context)
    gpus = 1
    while gpus * usable < expert_bytes + other_bytes + cache:
        gpus *= 2
    sequences = int((gpus * usable - expert_bytes - other_bytes) // cache)
    idle = (1 - config.num_experts_per_tok / config.n_routed_experts) ** sequences
    # Of the embedding a step reads one row for each sequence.
    read = other_bytes - config.vocab_size * config.hidden_size + expert_bytes * (1 - idle)
    read += sequences * cache_bytes_read(config, context)
    reading = read / (gpus * gpu.bandwidth * 1e12)
    weights = EQUIVALENT_FP8 if gpu.has_fp8 else PLAIN
    operations = sequences * v4_operations(config, context).total(weights)
    computing = operations / (gpus * gpu.matmuls * 1e12)
    rate = sequences / max(reading, computing) / gpus
    return DecodeRate(gpus, sequences, rate, "memory" if reading > computing else "compute")


def cache_bytes_read(config: ModelConfig, n: int) -> int:
    """Returns the bytes of its cache that the last of n tokens reads."""
    row, index_row = kv_row_bytes(config, 2, True), index_row_bytes(config, 2, True)
    total = 0
    for kind in config.layer_types:
        entries = visible_entries(config, kind, n)
        if kind == "csa":
            total += index_row * entries
            entries = min(entries, config.index_topk)
        total += row * (min(n, config.sliding_window) + entries)
    return total
