"""Assigns every parameter to an optimizer and divides it into independent matrices.

The model hands in what it knows of its parameters, `ParameterFacts` by name; the settings are
applied to it here. Muon updates logically independent matrices: each expert's three, each output
group's, the two halves of an overlapping compressor. Every split is along the leading dimension, so
the stack is a view. The division follows the Muon section of the V4 report (arXiv 2606.19348).

Letters: N matrices of R rows and C columns.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from optim.config import OptimConfig
from optim.errors import OptimError

if TYPE_CHECKING:
    from rich.table import Table

Shape = tuple[int, ...]


class ParameterFacts(Protocol):
    """What the optimizer has to know about a parameter."""

    @property
    def group(self) -> str:
        """The group that settings name."""

    @property
    def stacked(self) -> bool:
        """Whether it has three dimensions, and every index of the first is a matrix."""

    @property
    def matrices(self) -> int | None:
        """How many matrices are stacked along its rows; None for AdamW."""

    @property
    def matrices_if_per_head(self) -> int | None:
        """The same number with `optim.muon.query_matrices` = per_head."""


@dataclass(frozen=True)
class Assignment:
    """The optimizer and the settings of one parameter.

    `matrices` is (N, R, C), the shape of its view as a stack of matrices; None for AdamW.
    """

    name: str
    shape: Shape
    optimizer: Literal["adamw", "muon"]
    weight_decay: float
    matrices: tuple[int, int, int] | None
    learning_rate_factor: float = 1.0


def build_table(
    shapes: Mapping[str, Shape], facts: Mapping[str, ParameterFacts], config: OptimConfig
) -> list[Assignment]:
    """Returns one Assignment for each parameter, in the order of `shapes`.

    Raises OptimError for a name that has no facts, and for a shape that cannot be divided into as
    many matrices as they say.
    """
    return [_assign(name, tuple(shape), facts, config) for name, shape in shapes.items()]


def _assign(
    name: str, shape: Shape, facts: Mapping[str, ParameterFacts], config: OptimConfig
) -> Assignment:
    if name not in facts:
        raise OptimError(
            f"parameter '{name}' is not in the model's table of parameters; every parameter must "
            "be there, with the optimizer that it belongs to"
        )
    parameter = facts[name]
    group = parameter.group
    factor = config.learning_rate_factors.get(group, 1.0)
    per_head = config.muon.query_matrices == "per_head"
    count = parameter.matrices_if_per_head if per_head else parameter.matrices
    matrices = None if count is None else _split(name, shape, parameter.stacked, count)
    if matrices is None or config.matrix_optimizer == "adamw":
        decay = 0.0 if group in config.no_weight_decay else config.adamw.weight_decay
        return Assignment(name, shape, "adamw", decay, None, factor)
    decay = 0.0 if group in config.no_weight_decay else config.muon.weight_decay
    return Assignment(name, shape, "muon", decay, matrices, factor)


def _split(name: str, shape: Shape, stacked: bool, count: int) -> tuple[int, int, int]:
    dims = 3 if stacked else 2
    if len(shape) != dims:
        raise OptimError(f"parameter '{name}' has shape {list(shape)}; it must have {dims} dims")
    if stacked:
        return shape[0], shape[1], shape[2]
    rows, columns = shape
    if count < 1 or rows % count:
        raise OptimError(f"parameter '{name}' has {rows} rows, which must be divisible by {count}")
    return count, rows // count, columns


def render_table(table: list[Assignment]) -> "Table":
    """Returns the table for printing; layers with the same entries share one line."""
    from rich.table import Column, Table  # a quarter of a second to import

    lines: Counter[tuple[str, ...]] = Counter()
    for entry in table:
        stack = "x".join(map(str, entry.matrices)) if entry.matrices else ""
        shape = "x".join(map(str, entry.shape))
        pattern = re.sub(r"\.\d+\.", ".*.", entry.name)
        settings = f"{entry.weight_decay:g}", f"{entry.learning_rate_factor:g}"
        lines[pattern, shape, entry.optimizer, stack, *settings] += 1
    name = Column("parameter", overflow="fold")
    view = Table(name, "shape", "optimizer", "matrices", "weight decay", "lr factor", "count")
    for key, count in lines.items():
        view.add_row(*key, str(count))
    return view
