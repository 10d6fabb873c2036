"""Verdicts as a table: errors, times and choices of a GPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from model.kernels.operations import BLOCKS_OF_TRITON
from trainer.kernels.verdict import Verdict


def describe_verdicts(key: Mapping[str, Any], verdicts: Sequence[Verdict]) -> Iterator[Table | str]:
    """Yields a table, and a line for each kernel that did not pass; `key` as a verdict file has it.

    Errors are relative, of outputs and of gradients; times are of forward and backward together.
    """
    platform, problem = key["platform"], key["problem"]
    model = problem["model"]
    table = Table(
        title=f"{platform['name']}, driver {platform['driver']}, torch "
        f"{platform['torch_version']}, triton {platform['triton']}; {problem['dtype']}, hidden "
        f"{model['hidden_size']}, head {model['head_dim']}, {problem['micro_tokens']:,} tokens",
        title_justify="left",
    )
    table.add_column("operation")
    columns = "Triton's error", "eager's error", "Triton", "eager", "others"
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("choice")
    for one in verdicts:
        others = [name for name in one.milliseconds if name not in ("eager", "triton")]
        table.add_row(
            one.operation,
            _error(one.errors.get("triton")),
            _error(one.errors.get("eager")),
            _time(one.milliseconds.get("triton")),
            _time(one.milliseconds.get("eager")),
            ", ".join(f"{name} {_time(one.milliseconds[name])}" for name in others),
            one.choice + _blocks(one),
        )
    yield table
    for one in verdicts:
        if not one.passed:
            yield f"{one.operation}: its Triton kernel is not used on this GPU: {one.reason}"
        for name, reason in one.refused.items():
            yield f"{one.operation}: {name} is not used on this GPU: {reason}"


def _error(pair: Sequence[float] | None) -> str:
    if pair is None:
        return ""
    return ", ".join("-" if math.isnan(error) else f"{error:.1e}" for error in pair)


def _time(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3g} ms"


def _blocks(verdict: Verdict) -> str:
    if verdict.choice not in BLOCKS_OF_TRITON or not verdict.blocks:
        return ""
    return f" ({', '.join(f'{name} {size}' for name, size in verdict.blocks.items())})"
