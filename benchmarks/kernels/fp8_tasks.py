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

from benchmarks.kernels.attention_tasks import (
    DEVICE,
    DTYPE,
    Task,
    Work,
    eager_versions,
    randn,
    sizes_of,
    task_of,
)
from model import ModelConfig
from model.kernel_cases import fp8 as cases
from model.kernels.block_sizes import FP8_BLOCK
from model.kernels.fp8 import eager


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the tasks, since only one at a time fits in memory."""
    makers = (linear_task, matmul_task, rounding_task, experts_task)
    return [lambda make=make: make(config, row) for make in makers]


def _linear(config: ModelConfig, row: int) -> tuple[Tensor, Tensor]:
    """Returns rows and weight of attention's wo_b, a layer's largest linear."""
    inputs, outputs = config.o_groups * config.o_lora_rank, config.hidden_size
    return randn(row, inputs), randn(outputs, inputs) * inputs**-0.5


def linear_task(config: ModelConfig, row: int) -> Task:
    """Makes attention's wo_b with the rounding of its factors."""
    shape = (1, config.o_groups * config.o_lora_rank, config.hidden_size)
    case = cases.linear_case(sizes_of(config, row), shape, 1.0)

    def in_bf16(x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)

    return task_of(case, "FP8 linear", row, **{"torch in bf16": in_bf16})


def matmul_task(config: ModelConfig, row: int) -> Task:
    """Makes a linear's forward matmul alone, of rounded factors."""
    from model.kernels.fp8 import matmul_triton
    from model.kernels.fp8.quantise_triton import quantise, quantise_weight
    from model.kernels.row_tiles_triton import tiles_of

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
    from model.kernels.fp8.quantise_triton import quantise
    from model.kernels.row_tiles_triton import tiles_of

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
    sizes = sizes_of(config, row)
    ends_E = cases.expert_ends(sizes)

    def in_bf16(x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends_E)

    return task_of(cases.experts_case(sizes), "FP8 experts", row, **{"torch in bf16": in_bf16})
