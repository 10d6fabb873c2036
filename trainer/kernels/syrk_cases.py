"""The optimizer's symmetric matmul, as cases of a check. N matrices of R rows and C columns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.kernel_cases import Blocks, Case, Function, MakeCase, Sizes

BLOCK_CHOICES: tuple[Blocks, ...] = (
    {"block": 128, "block_k": 64},
    {"block": 128, "block_k": 32},
    {"block": 64, "block_k": 64},
)
_ODD = (2, 129, 203)
"""Matrices with an incomplete block in every dimension."""
_COUNT = 4
"""Matrices of a stack that are timed."""


def syrk_cases(sizes: Sizes, matrices: tuple[tuple[int, int], ...]) -> Iterator[MakeCase]:
    """Yields matrices of odd sizes, or those of the model, each with and without an addend."""
    shapes = [_ODD]
    if not sizes.dense:
        shapes = [(_COUNT, min(matrix), max(matrix)) for matrix in matrices]
    for shape in dict.fromkeys(shapes):
        for adds in (False, True):
            yield partial(syrk_case, sizes, shape, adds)


def syrk_case(sizes: Sizes, shape: tuple[int, int, int], adds: bool) -> Case:
    """Makes A·Aᵀ, or βC + αA·Aᵀ with a symmetric C."""
    from optim import syrk, syrk_triton

    draw, (count, rows, columns) = sizes.draw(), shape
    leaves = {"a": draw(*shape, scale=columns**-0.5)}
    alpha, beta = (2.0315, -4.775) if adds else (1.0, 0.0)
    if adds:
        c = draw(count, rows, rows, scale=0.5)
        leaves["c"] = c + c.mT

    def of(product: Function) -> Function:
        def function(a: Tensor, c: Tensor | None = None) -> Tensor:
            return product(a.new_empty(count, rows, rows), a, c, beta, alpha)

        return function

    def naive(a: Tensor, c: Tensor | None = None) -> Tensor:
        square = alpha * a @ a.mT
        return square if c is None else beta * c + square

    return Case(
        f"{rows} x {columns}" + (" with an addend" if adds else ""),
        leaves,
        eager=of(syrk.syrk_),
        triton=lambda blocks: of(lambda *x: syrk_triton.syrk_(*x, **dict[str, Any](blocks))),
        naive=naive if sizes.dense else None,
        differentiable=False,
    )


def has_matrices(matrices: tuple[tuple[int, int], ...], dtype: torch.dtype) -> bool:
    """Returns whether Muon updates any matrices in a dtype that the kernel takes."""
    return bool(matrices) and dtype in (torch.bfloat16, torch.float16)
