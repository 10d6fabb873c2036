"""The optimizer's symmetric matmul, as cases of a check. N matrices of R rows and C columns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from model.kernel_cases import Blocks, Case, Function, MakeCase, Sizes
from model.kernels.operations import Choice

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
    """Yields matrices of odd sizes, or those of the model, each with and without an addend.

    And as views of higher ones, which the optimizer transposes: the experts' w2.
    """
    shapes = [_ODD]
    if not sizes.dense:
        shapes = [(_COUNT, min(matrix), max(matrix)) for matrix in matrices]
    for shape in dict.fromkeys(shapes):
        for adds in (False, True):
            yield partial(syrk_case, sizes, shape, adds)
        yield partial(syrk_case, sizes, shape, False, transposed=True)


def syrk_case(
    sizes: Sizes, shape: tuple[int, int, int], adds: bool, transposed: bool = False
) -> Case:
    """Makes A·Aᵀ, or βC + αA·Aᵀ with a symmetric C; A may lie transposed in memory."""
    from optim import syrk, syrk_quack, syrk_triton

    draw, (count, rows, columns) = sizes.draw(), shape
    in_memory = (count, columns, rows) if transposed else shape
    leaves = {"a": draw(*in_memory, scale=columns**-0.5)}
    alpha, beta = (2.0315, -4.775) if adds else (1.0, 0.0)
    if adds:
        c = draw(count, rows, rows, scale=0.5)
        leaves["c"] = c + c.mT

    def function(choice: Choice) -> Function:
        product: Any = syrk.syrk_
        if choice.name == "triton":
            product = syrk_triton.syrk_
            product = partial(product, **choice.blocks)
        elif choice.name == "quack":
            product = syrk_quack.syrk_

        def of_new(a: Tensor, c: Tensor | None = None) -> Tensor:
            a = a.mT if transposed else a
            out: Tensor = product(a.new_empty(count, rows, rows), a, c, beta, alpha)
            return out

        return of_new

    def naive(a: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.mT if transposed else a
        square = alpha * a @ a.mT
        return square if c is None else beta * c + square

    return Case(
        f"{rows} x {columns}" + " with an addend" * adds + ", transposed" * transposed,
        leaves,
        function,
        naive=naive if sizes.dense else None,
        differentiable=False,
    )
