"""Inputs and implementations of every operation, at any model's widths.

A check of the kernels on a user's GPU and the benchmarks both use them. Only the sizes decide what
a case holds; what counts as right or fast is decided by who uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from model.kernel_cases import attention, fp8, indexer, layers
from model.kernel_cases.case import (
    RAGGED,
    Blocks,
    Case,
    Draw,
    Function,
    MakeCase,
    Selection,
    Sizes,
    Work,
)

__all__ = [
    "CASES",
    "RAGGED",
    "Blocks",
    "Case",
    "CasesOfOperation",
    "Draw",
    "Function",
    "MakeCase",
    "Selection",
    "Sizes",
    "Work",
]


def _no_choice(config: ModelConfig) -> Sequence[Blocks]:
    return ({},)


def _channels(config: ModelConfig) -> Sequence[Blocks]:
    return ({"block_x": 64}, {"block_x": 128})


def _stages(config: ModelConfig) -> Sequence[Blocks]:
    return ({"stages": 3}, {"stages": 4})


@dataclass(frozen=True)
class CasesOfOperation:
    """Attributes:
    cases: yields what makes the cases at these sizes.
    block_choices: the block sizes with which Triton may run, its own first.
    """

    cases: Callable[[Sizes], Iterator[MakeCase]]
    block_choices: Callable[[ModelConfig], Sequence[Blocks]] = _no_choice


CASES = {
    "attention": CasesOfOperation(attention.attention_cases, attention.block_choices),
    "indexer": CasesOfOperation(indexer.indexer_cases, indexer.block_choices),
    "indexer_loss": CasesOfOperation(indexer.indexer_loss_cases, indexer.block_choices),
    "compressor": CasesOfOperation(layers.compressor_cases, _channels),
    "norms": CasesOfOperation(layers.norm_cases),
    "hyper_connections": CasesOfOperation(layers.hyper_connection_cases),
    "swiglu": CasesOfOperation(layers.swiglu_cases),
    "permute": CasesOfOperation(layers.permute_cases),
    "grouped_mm": CasesOfOperation(fp8.grouped_mm_cases, _stages),
    "cross_entropy": CasesOfOperation(layers.cross_entropy_cases),
    "fp8": CasesOfOperation(fp8.fp8_cases),
}
"""By the name of the operation, as `model.kernels.operations.OPERATIONS` has it; the optimizer's
are in trainer/kernels/."""
