"""Matmuls in FP8 as tasks for a benchmark: a linear, experts, and both of a linear's two halves.

The tensor cores multiply FP8 numbers at twice the rate of bf16, in which the ceiling is measured:
an operation in FP8 counts as half of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from benchmarks.kernels.attention_tasks import DEVICE, DTYPE, Task, Work, eager_versions, randn
from model import ModelConfig
from model.kernels.block_sizes import FP8_BLOCK
from model.kernels.fp8 import eager
from model.moe import ROW_ALIGNMENT

_RANKS = 8
"""Timed are the experts of one of eight expert-parallel ranks, with the rows that it receives."""


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """One at a time."""
    makers = (linear_task, matmul_task, rounding_task, experts_task)
    return [lambda make=make: make(config, row) for make in makers]


def _linear(config: ModelConfig, row: int) -> tuple[Tensor, Tensor]:
    """Rows and weight of attention's wo_b, a layer's largest linear."""
    inputs, outputs = config.o_groups * config.o_lora_rank, config.hidden_size
    return randn(row, inputs), randn(outputs, inputs) * inputs**-0.5


def _work(x: Tensor, weight: Tensor, y_columns: int) -> tuple[Work, Work]:
    """Forward's and backward's: every tensor once in bf16, one matmul and two."""
    of_x, of_y, of_weight = x.numel(), len(x) * y_columns, weight.numel()
    operations = float(len(x)) * x.shape[1] * y_columns
    return (
        Work(operations, 2.0 * (of_x + of_y + of_weight)),
        Work(2 * operations, 2.0 * (2 * of_x + of_y + 2 * of_weight)),
    )


def linear_task(config: ModelConfig, row: int) -> Task:
    """A linear with the rounding of what it multiplies."""
    from model.kernels.fp8 import matmul_triton

    x, weight = _linear(config, row)
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda x, w: matmul_triton.batched(x[None], w[None])[0],
        "torch in bf16": F.linear,
    }
    implementations |= eager_versions(lambda x, w: eager.eager_batched(x[None], w[None])[0], row)
    return Task("linear in FP8", [x, weight], implementations, *_work(x, weight, len(weight)))


def matmul_task(config: ModelConfig, row: int) -> Task:
    """A linear's forward matmul alone, of factors rounded before."""
    from model.kernels.fp8 import matmul_triton
    from model.kernels.fp8.quantise_triton import quantise, quantise_weight, tiles_of

    x, weight = _linear(config, row)
    tiles = tiles_of(torch.tensor([row], dtype=torch.int32, device=DEVICE), row)
    rows, _ = quantise(x, tiles, rows=True, columns=False)
    codes = quantise_weight(weight[None], turned=False)
    of_weight = codes.scales[0]
    of_weight = F.pad(of_weight, (0, -of_weight.shape[1] % 4))  # as torch wants them

    def triton(x: Tensor, w: Tensor) -> Tensor:
        return matmul_triton.matmul_(x.new_empty(len(x), len(w)), rows, codes, tiles)

    def torch_scaled(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_mm(
            rows.codes,
            codes.codes[0].t(),
            rows.scales.t(),
            ScalingType.BlockWise1x128,
            of_weight.t(),
            ScalingType.BlockWise128x128,
            output_dtype=DTYPE,
        )

    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": triton,
        "torch scaled_mm": torch_scaled,
        "torch in bf16": F.linear,
        "eager": lambda x, w: eager.eager_batched(x[None], w[None])[0],
    }
    operations = float(row) * weight.numel()
    moved = float(x.numel() + weight.numel()) + 2.0 * row * len(weight)
    work = Work(operations, moved)
    return Task("linear in FP8, rounded before", [x, weight], implementations, work, None)


def rounding_task(config: ModelConfig, row: int) -> Task:
    """What a linear's backward does with the output's gradient, by rows and by columns.

    Codes are not numbers to compare: `tests/model/kernels/test_gpu.py` compares them to the bit.
    """
    from model.kernels.fp8.quantise_triton import quantise, tiles_of

    tiles = tiles_of(torch.tensor([row], dtype=torch.int32, device=DEVICE), row)
    grad = randn(row, config.hidden_size)
    implementations: dict[str, Callable[..., Tensor]] = {
        "codes, triton": lambda g: quantise(g, tiles, rows=True, columns=True)[0].codes
    }
    implementations |= eager_versions(
        lambda g: (
            eager.quantise_dequantise(g, 1, FP8_BLOCK) + eager.quantise_dequantise(g, FP8_BLOCK, 1)
        ),
        row,
    )
    count = float(grad.numel())
    return Task("rounding to FP8", [grad], implementations, Work(20 * count, 4 * count), None)


def experts_task(config: ModelConfig, row: int) -> Task:
    """The routed experts' w1 with rows that went to them by chance."""
    from model.kernels.fp8 import matmul_triton

    experts, inner = config.n_routed_experts // _RANKS, config.moe_intermediate_size
    count_E = torch.randint(experts, (row * config.num_experts_per_tok,)).bincount(
        minlength=experts
    )
    ends = ((count_E + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT).cumsum(0)
    x = randn(int(ends[-1]), config.hidden_size)
    weight = randn(experts, inner, config.hidden_size) * config.hidden_size**-0.5
    ends_E = ends.to(DEVICE, torch.int32)
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda x, w: matmul_triton.grouped(x, w, ends_E),
        "torch in bf16": lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=ends_E),
    }
    implementations |= eager_versions(lambda x, w: eager.eager_grouped(x, w, ends_E), row)
    return Task("experts in FP8", [x, weight], implementations, *_work(x, weight, inner))
