"""Quantisation-aware training: forward and backward round as inference does.

At the end of post-training the report (§3.4) uses MXFP4 for the routed experts' weights and for the
queries and keys of the lightning indexer. The official code also stores attention's keys and
compressed entries in FP8, all but their rotary dims. Everything else stays as it is. Gradients go
straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.indexer import Indexer
from model.kernels.mxfp4 import quantise_dequantise
from model.moe import Experts


@contextmanager
def fake_quantised(model: nn.Module, kv: bool = True) -> Iterator[None]:
    """Context in which the model's forward rounds to MXFP4, and with `kv` keys and entries to FP8.

    Experts' weights are rounded once, on entry, into a second copy, so they must not be updated
    inside. Backward belongs inside, since recomputation runs forward again.
    """
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    try:
        for experts in stacks:
            experts.rounded = (
                quantise_dequantise(experts.w1),
                quantise_dequantise(experts.w2),
                quantise_dequantise(experts.w3),
            )
        with fake_quantised_layers(model, kv):
            yield
    finally:
        for experts in stacks:
            experts.rounded = None


@contextmanager
def fake_quantised_layers(model: nn.Module, kv: bool = True) -> Iterator[None]:
    """Context of ``fake_quantised`` for a model whose experts' weights are rounded already."""
    layers: list[Attention | Indexer] = [
        module
        for module in model.modules()
        if isinstance(module, Indexer) or (kv and isinstance(module, Attention))
    ]
    try:
        for layer in layers:
            layer.fake_quantised = True
        yield
    finally:
        for layer in layers:
            layer.fake_quantised = False


@torch.no_grad()
def round_experts_(model: nn.Module) -> None:
    """Rounds the experts' weights to MXFP4 in place, in a model that is not trained."""
    for module in model.modules():
        if isinstance(module, Experts):
            for weight in (module.w1, module.w2, module.w3):
                weight.copy_(quantise_dequantise(weight))


def rounded_weights(model: nn.Module) -> list[Tensor]:
    """Returns the experts' rounded weights inside ``fake_quantised``, an empty list outside."""
    experts = (module for module in model.modules() if isinstance(module, Experts))
    return [tensor for module in experts if module.rounded is not None for tensor in module.rounded]
