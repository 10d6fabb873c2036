"""Quantisation-aware training: the numbers that are served in four bits, already while training.

The report (3.4) trains the end of post-training with MXFP4 numbers for the routed experts' weights
and for the queries and keys of the lightning indexer, and nothing else: neither shared experts nor
the compressor of the attention. Gradients go straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from model.indexer import Indexer
from model.kernels.mxfp4 import rounded
from model.moe import Experts


@contextmanager
def quantised(model: nn.Module) -> Iterator[None]:
    """Inside, the model's forward is that of its quantised self.

    Experts' weights are rounded once, here, and stay until the end, in as much memory again: change
    weights outside only. Backward belongs inside, since it may run forward again.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    try:
        for module in experts:
            module.rounded = (rounded(module.w1), rounded(module.w2), rounded(module.w3))
        for indexer in indexers:
            indexer.quantised = True
        yield
    finally:
        for module in experts:
            module.rounded = None
        for indexer in indexers:
            indexer.quantised = False


def rounded_weights(model: nn.Module) -> list[Tensor]:
    """The experts' rounded weights, inside of `quantised`."""
    experts = (module for module in model.modules() if isinstance(module, Experts))
    return [tensor for module in experts if module.rounded is not None for tensor in module.rounded]
