"""FP8: the quantisation of operands, to the bit, and matmuls of linears and of experts.

P rows of E experts; X and F a weight's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.kernel_cases.case import Case, Function, MakeCase, Sizes, Work, layers_of
from model.kernels import fp8
from model.kernels.block_sizes import FP8_BLOCK
from model.kernels.fp8 import eager
from model.kernels.grouped_mm import grouped_mm
from model.kernels.grouped_mm.naive import naive_grouped_mm
from model.kernels.operations import Choice

_RANKS = 8
"""The experts of one of so many expert-parallel ranks are timed, with the rows that it receives."""
_ALIGNMENT = 16
"""Rows of an expert are a multiple of this, as dispatch pads them."""


def fp8_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields rounding, every linear, and the routed experts' matmuls."""
    if sizes.dense:
        yield lambda: rounding_case(sizes)
        for transposed in (False, True):
            yield partial(weight_rounding_case, sizes, transposed)
    for shape, weight in linears_of(sizes).items():
        yield partial(linear_case, sizes, shape, weight)
    for second in (False, True):
        yield partial(experts_case, sizes, second)


def _ends(sizes: Sizes, experts: int, rows: int) -> Tensor:
    """Returns where each expert's rows end, int32 [E]; one expert has none."""
    count_E = sizes.draw().integers(experts, rows).bincount(minlength=experts)
    count_E = (count_E + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    count_E[experts // 2] *= experts == 1
    return count_E.cumsum(0).to(sizes.device, torch.int32)


def expert_ends(sizes: Sizes) -> Tensor:
    """Returns where the rows of each expert of `experts_case` end."""
    config = sizes.config
    if sizes.dense:
        return _ends(sizes, 5, sizes.tokens)
    experts = max(config.n_routed_experts // _RANKS, 1)
    return _ends(sizes, experts, sizes.tokens * config.num_experts_per_tok)


def rounding_case(sizes: Sizes) -> Case:
    """Makes the rounding of a gradient by rows and by columns; a number in it is infinite."""
    from model.kernels.fp8.quantise_triton import quantise
    from model.kernels.row_tiles_triton import tiles_of

    ends_E = _ends(sizes, 4, sizes.tokens)
    rows = int(ends_E[-1])
    x = sizes.draw()(rows, sizes.config.hidden_size)
    x[:, 7] *= 2.0**20
    x[rows // 2, 9] = torch.inf
    tile_P = eager.tiles_of_groups(ends_E, rows)
    # The row's place in its tile: tiles have consecutive rows.
    first_P = torch.searchsorted(tile_P, tile_P)
    place_P = torch.arange(rows, device=sizes.device) - first_P

    def triton(x: Tensor) -> tuple[Tensor, Tensor]:
        by_row, by_column = quantise(x, tiles_of(ends_E, rows), rows=True, columns=True)
        scales = by_row.scales.t().repeat_interleave(FP8_BLOCK, 1)
        columns = by_column.codes.float()[tile_P, :, place_P] * by_column.scales[tile_P]
        return (by_row.codes.float() * scales)[:, : x.shape[1]], columns

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        by_column = eager.quantise_dequantise_by_tile(x, tile_P, len(ends_E))
        return eager.quantise_dequantise(x, 1, FP8_BLOCK).float(), by_column.float()

    return Case(
        "rounding of rows and columns",
        {"rows": x},
        lambda choice: triton if choice.name == "triton" else reference,
        outputs=("rows", "columns"),
        differentiable=False,
        exact=True,
        weight=0.0,
    )


def weight_rounding_case(sizes: Sizes, transposed: bool) -> Case:
    """Makes the rounding of two experts' weights."""
    from model.kernels.fp8.quantise_triton import quantise_weight

    shape = (2, sizes.routed_inner, sizes.config.hidden_size)

    def reference(weight: Tensor) -> Tensor:
        return eager.quantise_dequantise(weight, FP8_BLOCK, FP8_BLOCK).float()

    def triton(weight: Tensor) -> Tensor:
        codes, scales = quantise_weight(weight, transposed=transposed)
        for dim in (1, 2):
            scales = scales.repeat_interleave(FP8_BLOCK, dim)
        values = codes.float() * scales[:, : codes.shape[1], : codes.shape[2]]
        values = values.transpose(1, 2) if transposed else values
        return values[:, : shape[1], : shape[2]]

    return Case(
        "rounding of weights" + (", transposed" if transposed else ""),
        {"weight": sizes.draw()(*shape)},
        lambda choice: triton if choice.name == "triton" else reference,
        differentiable=False,
        exact=True,
        weight=0.0,
    )


def linears_of(sizes: Sizes) -> dict[tuple[int, int, int], float]:
    """Returns (groups, inputs, outputs) of a model's distinct linears, and how many it has."""
    config = sizes.config
    hidden, rank, inner = config.hidden_size, config.q_lora_rank, sizes.shared_inner
    queries, groups = config.num_attention_heads * config.head_dim, config.o_groups
    layers, predictors = layers_of(config, "window", "csa", "hca"), config.num_nextn_predict_layers
    indexer = (1, rank, config.index_n_heads * config.index_head_dim)
    counts = [
        ((1, hidden, rank), layers),
        ((1, rank, queries), layers),
        ((1, hidden, config.head_dim), layers),
        ((groups, queries // groups, config.o_lora_rank), layers),
        ((1, groups * config.o_lora_rank, hidden), layers),
        ((1, hidden, inner), 2 * layers),
        ((1, inner, hidden), layers),
        (indexer, layers_of(config, "csa")),
        ((1, hidden, hidden), 2 * predictors),
    ]
    linears: dict[tuple[int, int, int], float] = {}
    for shape, count in counts:
        if count:
            linears[shape] = linears.get(shape, 0.0) + count
    return linears


def linear_case(sizes: Sizes, shape: tuple[int, int, int], weight: float) -> Case:
    """Makes a linear of (groups, inputs, outputs), or each group's own: attention's wo_a.

    Rows, and the output's gradient, are views of tensors [T, groups, ...], as attention has them.
    """
    draw, (groups, inputs, outputs) = sizes.draw(), shape
    leaves = {
        "rows": draw(sizes.tokens, groups, inputs),
        "weight": draw(groups, outputs, inputs, scale=inputs**-0.5),
    }
    ends = [sizes.tokens]

    def naive(x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([_Exact.apply(x[:, g], w[g, None], ends) for g in range(groups)], 1)

    def function(choice: Choice) -> Function:
        return lambda x, w: fp8.batched(x.transpose(0, 1), w, choice).transpose(0, 1)

    flops = float(groups * sizes.tokens) * inputs * outputs
    moved = groups * sizes.tokens
    return Case(
        f"linear of {inputs} to {outputs}" + (f" in {groups} groups" if groups > 1 else ""),
        leaves,
        function,
        naive=naive if sizes.dense else None,
        weight=weight,
        # The tensor cores multiply FP8 at twice the rate of bf16: one FLOP counts as half.
        forward=Work(flops, 2.0 * (moved * (inputs + outputs) + groups * inputs * outputs)),
        backward=Work(2 * flops, 2.0 * moved * (2 * inputs + outputs)),
    )


def grouped_mm_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the routed experts' matmuls in the dtype of the run."""
    for second in (False, True):
        yield partial(_experts_case, sizes, grouped_mm, naive_grouped_mm, second)


def experts_case(sizes: Sizes, second: bool = False) -> Case:
    """Makes the routed experts' w1, or w2, in FP8."""
    return _experts_case(
        sizes, fp8.grouped, lambda x, w, ends_E: _Exact.apply(x, w, ends_E.tolist()), second
    )


def _experts_case(
    sizes: Sizes,
    grouped: Callable[[Tensor, Tensor, Tensor, Choice], Tensor],
    naive: Callable[[Tensor, Tensor, Tensor], Tensor],
    second: bool,
) -> Case:
    """Makes the routed experts' w1, of which w3 has the shape, or their ``second`` matmul, w2.

    Rows after the last expert's are NaN, as nothing reads them.
    """
    config, draw = sizes.config, sizes.draw()
    inner, dim = sizes.routed_inner, config.hidden_size
    if second:
        inner, dim = dim, inner
    ends_E = expert_ends(sizes)
    experts, live = len(ends_E), int(ends_E[-1])
    leaves = {
        "rows": draw(live, dim),
        "weight": draw(experts, inner, dim, scale=dim**-0.5),
    }

    def function(choice: Choice) -> Function:
        def matmul(x: Tensor, weight: Tensor) -> Tensor:
            x = torch.cat([x, x.new_full((_ALIGNMENT, dim), torch.nan)])
            return grouped(x, weight, ends_E, choice)[:live]

        return matmul

    flops = float(live) * inner * dim
    return Case(
        "experts, w2" if second else "experts, w1",
        leaves,
        function,
        naive=(lambda x, w: naive(x, w, ends_E)) if sizes.dense else None,
        weight=(1.0 if second else 2.0) * len(config.layer_types),
        forward=Work(flops, 2.0 * (live * (inner + dim) + experts * inner * dim)),
        backward=Work(2 * flops, 2.0 * live * (2 * dim + inner)),
    )


class _Exact(torch.autograd.Function):
    """Matmuls of quantised operands, summed in the dtype of x [P, X], which is float64.

    The operands are quantised by the eager version, whose codes tests compare with a search in the
    table of E4M3's numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ends = ends
        rows, blocks = _rounded(x, 1, FP8_BLOCK), _rounded(weight, FP8_BLOCK, FP8_BLOCK)
        return torch.cat([rows[some] @ blocks[e].t() for e, some in _groups(ends)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        blocks, rows = _rounded(weight, FP8_BLOCK, FP8_BLOCK), _rounded(grad, 1, FP8_BLOCK)
        grad_x, grad_weight = [], []
        for e, some in _groups(ctx.ends):
            grad_x.append(rows[some] @ blocks[e])
            grad_weight.append(
                _rounded(grad[some], FP8_BLOCK, 1).t() @ _rounded(x[some], FP8_BLOCK, 1)
            )
        return torch.cat(grad_x), torch.stack(grad_weight), None


def _groups(ends: list[int]) -> list[tuple[int, slice]]:
    return [(e, slice(*some)) for e, some in enumerate(pairwise([0, *ends]))]


def _rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Quantises and dequantises; fp32 holds all numbers that a run's dtype does."""
    if not x.numel():
        return x
    return eager.quantise_dequantise(x.float(), rows, columns).to(x.dtype)
