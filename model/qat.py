"""Quantisation-aware training: forward and backward use weights in MXFP4, as inference does.

At the end of post-training the report (§3.4) uses MXFP4 for the routed experts' weights and for the
queries and keys of the lightning indexer; shared experts and the attention's compressor stay as
they are. Gradients go straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from model.indexer import Indexer
from model.kernels.mxfp4 import quantise_dequantise
from model.moe import Experts


@contextmanager
def fake_quantised(model: nn.Module) -> Iterator[None]:
    """Context in which the model's forward rounds to MXFP4.

    Experts' weights are rounded once, on entry, into a second copy, so they must not be updated
    inside. Backward belongs inside, since recomputation runs forward again.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    try:
        for module in experts:
            module.rounded = (
                quantise_dequantise(module.w1),
                quantise_dequantise(module.w2),
                quantise_dequantise(module.w3),
            )
        for indexer in indexers:
            indexer.fake_quantised = True
        yield
    finally:
        for module in experts:
            module.rounded = None
        for indexer in indexers:
            indexer.fake_quantised = False


def rounded_weights(model: nn.Module) -> list[Tensor]:
    """Returns the experts' rounded weights inside ``fake_quantised``, an empty list outside."""
    experts = (module for module in model.modules() if isinstance(module, Experts))
    return [tensor for module in experts if module.rounded is not None for tensor in module.rounded]
