"""The operations of a model, and which implementation each of them uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from model.config import ModelConfig
from model.kernels import backend
from model.kernels.operations import Kernels


def operations_of(config: ModelConfig, in_fp8: bool = False) -> tuple[str, ...]:
    """Returns the operations that this model has, out of model.kernels.operations.OPERATIONS.

    Args:
        in_fp8: whether linears and experts multiply in FP8.
    """
    operations = ["attention"]
    operations += ["indexer", "indexer_loss"] * ("csa" in config.layer_types)
    operations += ["compressor"] * bool({"csa", "hca"} & set(config.layer_types))
    operations += ["norms", "hyper_connections", "swiglu", "permute"]
    operations += ["grouped_mm"] * (not in_fp8)
    return *operations, "cross_entropy", *["fp8"] * in_fp8


def unsupported_by_triton(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, operations: Iterable[str]
) -> dict[str, str]:
    """Returns the reason for each operation of this model that Triton cannot run."""
    reasons: dict[str, str] = {}
    for operation in operations:
        for check in _checks(config, device, dtype, operation):
            try:
                check()
            except backend.UnsupportedError as error:
                reasons.setdefault(operation, str(error).removeprefix(f"{operation}: "))
    return reasons


def _checks(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, operation: str
) -> list[Callable[[], None]]:
    """Returns what has to hold for an operation at all sizes that the model has."""
    index_dim, index_heads = config.index_head_dim, config.index_n_heads
    ratios = [config.compress_ratio(kind) for kind in {*config.layer_types} - {"window"}]
    widths = {config.hidden_size, config.q_lora_rank, config.head_dim, index_dim}
    index = partial(backend.indexer, device, dtype, index_dim, index_heads, config.index_topk)
    checks: dict[str, list[Callable[[], None]]] = {
        "attention": [partial(backend.attention, device, dtype, config.head_dim)],
        "indexer": [index],
        "indexer_loss": [partial(backend.indexer_loss, device, dtype, index_dim, index_heads)],
        "compressor": [partial(backend.compressor, device, dtype, m) for m in sorted(ratios)],
        "norms": [partial(backend.norm, device, dtype, width) for width in sorted(widths)],
        "hyper_connections": [partial(backend.hyper_connection, device, dtype, config.hc_mult)],
        "swiglu": [partial(backend.swiglu, device, dtype)],
        "permute": [partial(backend.permute, device, dtype)],
        "grouped_mm": [partial(backend.grouped_mm, device, dtype)],
        "cross_entropy": [partial(backend.cross_entropy, device, dtype)],
        "fp8": [partial(backend.fp8, device, dtype)],
        "syrk": [partial(backend.syrk, device, dtype)],
    }
    return checks[operation]


def describe(kernels: Kernels, operations: Iterable[str]) -> str:
    """Returns one line, e.g. ``kernels: attention, indexer: eager (on cpu)``."""
    groups: dict[str, list[str]] = {}
    for operation in operations:
        groups.setdefault(str(getattr(kernels, operation)), []).append(operation)
    return "kernels: " + "; ".join(f"{', '.join(ops)}: {what}" for what, ops in groups.items())
