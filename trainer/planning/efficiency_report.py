"""`v4 plan --efficiency`: operations and cache against context, as a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from data.files import write_atomically
from model.config import ModelConfig
from trainer.planning.decode_rate import GPUS, decode_rate
from trainer.planning.efficiency import (
    gqa_cache_bytes,
    gqa_operations,
    v4_cache_bytes,
    v4_operations,
    v32_cache_bytes,
    v32_operations,
)

CONTEXTS = tuple(4096 << step for step in range(9))
"""4K to 1M tokens."""


@dataclass(frozen=True)
class Architecture:
    """A name, and the costs of a token at a length of context."""

    name: str
    operations: Callable[[int], float]
    cache_bytes: Callable[[int], int]


def architectures(config: ModelConfig, name: str) -> list[Architecture]:
    """Returns the config's model, V3.2, and grouped-query attention of the config's size."""
    return [
        Architecture(
            name, lambda n: v4_operations(config, n).total(), lambda n: v4_cache_bytes(config, n)
        ),
        Architecture("DeepSeek-V3.2", lambda n: v32_operations(n).total(), v32_cache_bytes),
        Architecture(
            f"{name} with GQA8",
            lambda n: gqa_operations(config, n).total(),
            lambda n: gqa_cache_bytes(config, n),
        ),
    ]


def describe_efficiency(
    config: ModelConfig, name: str, gpu: str | None = None, plot: Path | None = None
) -> Iterator[Table | str]:
    """Yields the tables; with `plot` also writes a picture there."""
    longest = config.max_position_embeddings
    contexts = [n for n in CONTEXTS if n <= longest] or [longest]
    models = architectures(config, name)
    table = Table(title="one token at inference, by tokens of context", title_justify="left")
    table.add_column("context", justify="right")
    for model in models:
        table.add_column(f"{model.name}\nGFLOP", justify="right")
    for model in models:
        table.add_column(f"{model.name}\ncache, GB", justify="right")
    for n in contexts:
        operations = [model.operations(n) for model in models]
        sizes = [model.cache_bytes(n) for model in models]
        cells = [f"{operations[0] / 1e9:,.1f}"]
        cells += [f"{x / 1e9:,.1f} ({operations[0] / x:.0%})" for x in operations[1:]]
        cells.append(f"{sizes[0] / 1e9:,.4f}")
        cells += [f"{x / 1e9:,.3f} ({sizes[0] / x:.1%})" for x in sizes[1:]]
        table.add_row(f"{n:,}", *cells)
    yield table
    yield (
        "GFLOP in equivalents of FP8: bf16 counts twice, FP4 half. In parentheses: "
        f"{name}'s share of it. Sources and formulas: trainer/planning/efficiency.py."
    )
    if gpu is not None:
        yield from _decode_table(config, gpu, contexts)
    if plot is not None:
        write_atomically(plot, _picture(models, contexts))
        yield f"wrote {plot}"


def _decode_table(config: ModelConfig, gpu: str, contexts: list[int]) -> Iterator[Table | str]:
    table = Table(title=f"decoding on {gpu}, an upper bound", title_justify="left")
    for column in ("context", "GPUs", "sequences", "tokens/s per GPU", "bound by"):
        table.add_column(column, justify="right")
    for n in contexts:
        rate = decode_rate(config, GPUS[gpu], n)
        speed = f"{rate.tokens_per_second:,.0f}"
        table.add_row(f"{n:,}", str(rate.gpus), f"{rate.sequences:,}", speed, rate.bound)
    yield table
    yield (
        "An estimate from data sheets: the GPUs share the weights in FP8 and MXFP4 and hold as "
        "many sequences as fit; communication is not counted."
    )


def _picture(models: list[Architecture], contexts: list[int]) -> bytes:
    """Draws operations of a token and the cache's size against context, as in Figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, color in zip(models, ("#3b82c4", "#8a8f98", "#e07b39"), strict=True):
        thousands = [n / 1024 for n in contexts]
        left.plot(thousands, [model.operations(n) / 1e12 for n in contexts], "o-", color=color)
        sizes = [model.cache_bytes(n) / 1e9 for n in contexts]
        right.plot(thousands, sizes, "o-", color=color, label=model.name)
    left.set_title("Operations of a token, TFLOP (FP8 equivalents)")
    right.set_title("Cache of a sequence, GB")
    for axes in (left, right):
        axes.set_xlabel("context, K tokens")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    left.set_ylim(top=1.3 * max(model.operations(contexts[-1]) for model in models[:2]) / 1e12)
    right.set_ylim(top=1.3 * max(model.cache_bytes(contexts[-1]) for model in models[:2]) / 1e9)
    right.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
