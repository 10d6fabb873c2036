"""Bytes of a cache, by kind of layer and part, from the config alone. Imports no torch.

K head dim; R rotary dims; J width of an index key; m tokens of an entry's window.
"""

from __future__ import annotations

from model.config import LayerType, ModelConfig
from model.kernels.block_sizes import KV_BLOCK, MXFP4_BLOCK

Part = tuple[LayerType, str]
FP32_BYTES = 4


def kv_row_bytes(config: ModelConfig, itemsize: int, packed: bool) -> int:
    """Returns the bytes of a key or an entry; `itemsize` is that of the model's precision.

    Packed: K - R dims in FP8, a byte of scale for every 64 of them, R dims of `itemsize` bytes.
    """
    plain, rotary = config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim
    if not packed:
        return config.head_dim * itemsize
    return plain + -(-plain // KV_BLOCK) + rotary * itemsize


def index_row_bytes(config: ModelConfig, itemsize: int, packed: bool) -> int:
    """Returns the bytes of an index key; packed: MXFP4 and a byte of scale for every 32 dims."""
    width = config.index_head_dim
    return width // 2 + width // MXFP4_BLOCK if packed else width * itemsize


def cache_bytes(
    config: ModelConfig, max_tokens: int, itemsize: int, packed: bool
) -> dict[Part, int]:
    """Returns the bytes that the layers of one sequence of `max_tokens` take, without MTP."""
    sizes: dict[Part, int] = {}

    def add(kind: LayerType, part: str, size: int) -> None:
        sizes[kind, part] = sizes.get((kind, part), 0) + size

    row = kv_row_bytes(config, itemsize, packed)
    for kind in config.layer_types:
        add(kind, "keys", config.sliding_window * row)
        ratio = config.compress_ratio(kind)
        if not ratio:
            continue
        entries = max_tokens // ratio
        add(kind, "entries", entries * row)
        add(kind, "tails", tail_bytes(kind, ratio, config.head_dim))
        if kind == "csa" and entries > config.index_topk:
            add(kind, "index keys", entries * index_row_bytes(config, itemsize, packed))
            add(kind, "tails", tail_bytes(kind, ratio, config.index_head_dim))
    return sizes


def tail_size(kind: LayerType, ratio: int) -> int:
    """Returns the tokens of a sequence whose inputs a compressor keeps: one window, or two."""
    return 2 * ratio if kind == "csa" else ratio


def tail_bytes(kind: LayerType, ratio: int, width: int) -> int:
    """Returns the bytes of a compressor's kept inputs: values and gates in fp32.

    Where windows overlap there are two halves of each.
    """
    halves = 2 if kind == "csa" else 1
    return tail_size(kind, ratio) * 2 * halves * width * FP32_BYTES
