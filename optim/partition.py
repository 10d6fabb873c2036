"""Which optimizer every parameter belongs to, and how it falls into independent matrices.

One table for the whole model, a pure function of names and shapes. Muon sees logically independent
matrices: each expert's three, each output group's, the two halves of an overlapping compressor.
Every split is along the leading dimension, so the stack is a view. The division follows the
Muon section of the V4 report (arXiv 2606.19348).
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.table import Column, Table

from optim.config import OptimConfig
from optim.errors import OptimError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MatrixSizes:
    """The model's sizes that say where a weight falls apart; plain numbers from its config."""

    o_groups: int
    num_attention_heads: int
    head_dim: int
    index_head_dim: int


@dataclass(frozen=True)
class Assignment:
    """One parameter's place. `matrices` is (N, R, C): view it so for Muon; None for AdamW."""

    name: str
    shape: Shape
    optimizer: Literal["adamw", "muon"]
    weight_decay: float
    matrices: tuple[int, int, int] | None
    learning_rate_factor: float = 1.0


_BLOCK = r"(?:layers|mtp)\.\d+\."
_COMPRESSOR = r"attn\.(?:indexer\.)?compressor\."

# Names are matched whole. Then comes how a Muon weight splits, or that AdamW has it, and the group
# that settings name. Of an MTP block, the group `mtp` is only what joins it to the model.
_RULES: tuple[tuple[str, str, str], ...] = (
    (r"embed\.weight", "adamw", "embedding"),
    (r"head\.weight", "adamw", "head"),
    (r"norm\.weight", "adamw", "norms"),
    (rf"{_BLOCK}(?:attn_norm|ffn_norm|attn\.q_norm|attn\.kv_norm)\.weight", "adamw", "norms"),
    (rf"{_BLOCK}{_COMPRESSOR}norm\.weight", "adamw", "norms"),
    (r"mtp\.\d+\.(?:enorm|hnorm|norm)\.weight", "adamw", "norms"),
    (rf"{_BLOCK}hc_(?:attn|ffn)_(?:base|scale)", "adamw", "hyper_connections"),
    (r"(?:mtp\.\d+\.)?hc_head_(?:base|scale)", "adamw", "hyper_connections"),
    (rf"{_BLOCK}attn\.attn_sink", "adamw", "attention"),
    (rf"{_BLOCK}attn\.compressor\.ape", "adamw", "compressor"),
    (rf"{_BLOCK}attn\.indexer\.compressor\.ape", "adamw", "indexer"),
    (rf"{_BLOCK}hc_(?:attn|ffn)_fn|(?:mtp\.\d+\.)?hc_head_fn", "whole", "hyper_connections"),
    (rf"{_BLOCK}attn\.(?:wq_a|wkv|wo_b)\.weight", "whole", "attention"),
    (rf"{_BLOCK}attn\.indexer\.weights_proj\.weight", "whole", "indexer"),
    (rf"{_BLOCK}attn\.wq_b\.weight", "heads", "attention"),
    (rf"{_BLOCK}attn\.indexer\.wq_b\.weight", "index_heads", "indexer"),
    (rf"{_BLOCK}attn\.wo_a\.weight", "groups", "attention"),
    (rf"{_BLOCK}attn\.compressor\.(?:wkv|wgate)\.weight", "halves", "compressor"),
    (rf"{_BLOCK}attn\.indexer\.compressor\.(?:wkv|wgate)\.weight", "index_halves", "indexer"),
    (rf"{_BLOCK}ffn\.gate\.weight", "whole", "router"),
    (rf"{_BLOCK}ffn\.experts\.w[123]", "experts", "experts"),
    (rf"{_BLOCK}ffn\.shared_experts\.w[123]\.weight", "whole", "shared_experts"),
    (r"mtp\.\d+\.(?:e_proj|h_proj)\.weight", "whole", "mtp"),
)


def build_table(
    named_shapes: Mapping[str, Shape], sizes: MatrixSizes, config: OptimConfig
) -> list[Assignment]:
    """One Assignment per parameter, in the order given.

    Raises OptimError for a name that no rule knows, and for a shape that does not fall into the
    matrices its rule asks for.
    """
    return [_assign(name, tuple(shape), sizes, config) for name, shape in named_shapes.items()]


def group_of(name: str) -> str:
    """The group of a parameter that settings can name. Raises KeyError for one of no model."""
    for pattern, _, group in _RULES:
        if re.fullmatch(pattern, name):
            return group
    raise KeyError(name)


def _assign(name: str, shape: Shape, sizes: MatrixSizes, config: OptimConfig) -> Assignment:
    rules = [(rule, group) for pattern, rule, group in _RULES if re.fullmatch(pattern, name)]
    if len(rules) != 1:
        raise OptimError(
            f"parameter '{name}' matches {len(rules)} rules of the optimizer table; every "
            "parameter must match exactly one rule in optim/partition.py"
        )
    rule, group = rules[0]
    factor = config.learning_rate_factors.get(group, 1.0)
    matrices = None if rule == "adamw" else _split(name, shape, rule, sizes, config)
    if matrices is None or config.matrix_optimizer == "adamw":
        decay = 0.0 if group in config.no_weight_decay else config.adamw.weight_decay
        return Assignment(name, shape, "adamw", decay, None, factor)
    decay = 0.0 if group in config.no_weight_decay else config.muon.weight_decay
    return Assignment(name, shape, "muon", decay, matrices, factor)


def _split(
    name: str, shape: Shape, rule: str, sizes: MatrixSizes, config: OptimConfig
) -> tuple[int, int, int]:
    dims = 3 if rule == "experts" else 2
    if len(shape) != dims:
        raise OptimError(f"parameter '{name}' has shape {list(shape)}; it must have {dims} dims")
    if rule == "experts":
        return shape[0], shape[1], shape[2]
    rows, columns = shape
    count = 1
    if rule == "groups":
        count = sizes.o_groups
    elif rule in ("halves", "index_halves"):
        width = sizes.head_dim if rule == "halves" else sizes.index_head_dim
        if rows not in (width, 2 * width):
            raise OptimError(
                f"parameter '{name}' has {rows} rows; a compressor of width {width} has {width}, "
                f"or {2 * width} where its windows overlap"
            )
        count = rows // width
    elif rule in ("heads", "index_heads") and config.muon.query_matrices == "per_head":
        count = sizes.num_attention_heads if rule == "heads" else rows // sizes.index_head_dim
    if count < 1 or rows % count:
        raise OptimError(f"parameter '{name}' has {rows} rows; they must divide by {count}")
    return count, rows // count, columns


def render_table(table: list[Assignment]) -> Table:
    """The table for people, through rich: layers that look the same share one line."""
    lines: Counter[tuple[str, ...]] = Counter()
    for entry in table:
        stack = "x".join(map(str, entry.matrices)) if entry.matrices else ""
        shape = "x".join(map(str, entry.shape))
        pattern = re.sub(r"\.\d+\.", ".*.", entry.name)
        settings = f"{entry.weight_decay:g}", f"{entry.learning_rate_factor:g}"
        lines[pattern, shape, entry.optimizer, stack, *settings] += 1
    name = Column("parameter", overflow="fold")
    view = Table(name, "shape", "optimizer", "matrices", "decay", "rate", "count")
    for key, count in lines.items():
        view.add_row(*key, str(count))
    return view
