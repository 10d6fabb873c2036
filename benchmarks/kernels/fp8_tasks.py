"""FP8 matmuls as tasks for a benchmark: a linear, its matmul and its rounding, and experts.

The tensor cores multiply FP8 numbers at twice the rate of bf16, in which the ceiling is measured,
so one FP8 FLOP counts as half.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from benchmarks.kernels.attention_tasks import DEVICE, DTYPE, Task, Work, eager_versions, randn
from model import ModelConfig
from model.dispatch import ROW_ALIGNMENT
from model.kernels.block_sizes import FP8_BLOCK
from model.kernels.fp8 import eager

_RANKS = 8
"""The experts of one of so many expert-parallel ranks are timed, with the rows that it receives."""


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the tasks, since only one at a time fits in memory."""
    makers = (linear_task, matmul_task, rounding_task, experts_task)
    return [lambda make=make: make(config, row) for make in makers]


def _linear(config: ModelConfig, row: int) -> tuple[Tensor, Tensor]:
    """Returns rows and weight of attention's wo_b, a layer's largest linear."""
    inputs, outputs = config.o_groups * config.o_lora_rank, config.hidden_size
    return randn(row, inputs), randn(outputs, inputs) * inputs**-0.5


def _work(x: Tensor, weight: Tensor, y_columns: int) -> tuple[Work, Work]:
    """Returns forward's and backward's work: each tensor once in bf16, one matmul and two."""
    x_size, y_size, weight_size = x.numel(), len(x) * y_columns, weight.numel()
    flops = float(len(x)) * x.shape[1] * y_columns
    return (
        Work(flops, 2.0 * (x_size + y_size + weight_size)),
        Work(2 * flops, 2.0 * (2 * x_size + y_size + 2 * weight_size)),
    )


def linear_task(config: ModelConfig, row: int) -> Task:
    """Makes a linear with the rounding of its factors."""
    from model.kernels.fp8 import matmul_triton

    x, weight = _linear(config, row)
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda x, w: matmul_triton.batched(x[None], w[None])[0],
        "torch in bf16": F.linear,
    }
    implementations |= eager_versions(lambda x, w: eager.eager_batched(x[None], w[None])[0], row)
    return Task("FP8 linear", [x, weight], implementations, *_work(x, weight, len(weight)))


def matmul_task(config: ModelConfig, row: int) -> Task:
    """Makes a linear's forward matmul alone, of rounded factors."""
    from model.kernels.fp8 import matmul_triton
    from model.kernels.fp8.quantise_triton import quantise, quantise_weight, tiles_of

    x, weight = _linear(config, row)
    tiles = tiles_of(torch.tensor([row], dtype=torch.int32, device=DEVICE), row)
    rows, _ = quantise(x, tiles, rows=True, columns=False)
    codes = quantise_weight(weight[None], transposed=False)
    scales = codes.scales[0]
    scales = F.pad(scales, (0, -scales.shape[1] % 4))  # torch requires multiples of 4

    def triton(x: Tensor, w: Tensor) -> Tensor:
        return matmul_triton.matmul_into(x.new_empty(len(x), len(w)), rows, codes, tiles)

    def torch_scaled(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_mm(
            rows.codes,
            codes.codes[0].t(),
            rows.scales.t(),
            ScalingType.BlockWise1x128,
            scales.t(),
            ScalingType.BlockWise128x128,
            output_dtype=DTYPE,
        )

    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": triton,
        "torch scaled_mm": torch_scaled,
        "torch in bf16": F.linear,
        "eager": lambda x, w: eager.eager_batched(x[None], w[None])[0],
    }
    flops = float(row) * weight.numel()
    moved = float(x.numel() + weight.numel()) + 2.0 * row * len(weight)
    work = Work(flops, moved)
    return Task("FP8 matmul of a linear", [x, weight], implementations, work, None)


def rounding_task(config: ModelConfig, row: int) -> Task:
    """Makes the rounding of the output's gradient in a linear's backward, by rows and by columns.

    Codes cannot be compared as numbers; `tests/model/kernels/test_gpu.py` compares their bits.
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
    """Makes the routed experts' w1 on randomly routed rows."""
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
    return Task("FP8 experts", [x, weight], implementations, *_work(x, weight, inner))
