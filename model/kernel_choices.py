"""Lists which implementation (Triton or eager) each operation of a model uses, and why."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.kernels import backend


def kernel_choices(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, in_fp8: bool = False
) -> dict[str, backend.Choice]:
    """Returns the implementation chosen for each operation of this model, with the reason.

    Args:
        in_fp8: whether linears and experts multiply in FP8.
    """
    kinds = set(config.layer_types)
    choices = backend.choices(
        device,
        dtype,
        hidden=config.hidden_size,
        streams=config.hc_mult,
        head_dim=config.head_dim,
        index_dim=config.index_head_dim,
        index_heads=config.index_n_heads,
        index_topk=config.index_topk,
        ratios=tuple(config.compress_ratio(kind) for kind in ("csa", "hca") if kind in kinds),
        in_fp8=in_fp8,
    )
    if "csa" not in kinds:
        choices = {name: choice for name, choice in choices.items() if "indexer" not in name}
    return choices


def describe(choices: dict[str, backend.Choice]) -> str:
    """Returns one line, e.g. ``kernels: attention, indexer: eager (on cpu)``."""
    groups: dict[str, list[str]] = {}
    for name, choice in choices.items():
        # "compressor, m = 4" has a comma of its own.
        groups.setdefault(str(choice), []).append(name.replace(", ", " "))
    return "kernels: " + "; ".join(f"{', '.join(ops)}: {what}" for what, ops in groups.items())
