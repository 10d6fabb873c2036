"""`v4 plan`: what a config asks for, before anything is run."""

import math

from rich.table import Table

from model.sizes import parameter_counts
from trainer.config import RunConfig

GIB = 2**30


def plan(config: RunConfig, world_size: int) -> Table:
    """Steps, tokens, parameters and the memory of one process when all are data parallel."""
    config.check_world(world_size)
    counts = parameter_counts(config.model)
    data = config.data
    step_tokens = data.batch_rows * data.row_length
    table = Table(title=f"{config.run_dir}", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    rows_of_rank = math.ceil(data.batch_rows / world_size)
    for name, value in (
        ("processes", f"{world_size:,}"),
        ("steps", f"{config.steps:,}"),
        ("tokens a step, at most", f"{step_tokens:,}"),
        ("tokens in all, at most", f"{step_tokens * config.steps:,}"),
        ("microbatches a step on a process", f"{math.ceil(rows_of_rank / data.micro_rows):,}"),
        ("parameters", f"{counts.total:,}"),
        ("  active for a token, without MTP", f"{counts.active:,}"),
        ("  in the MTP block", f"{counts.mtp:,}"),
    ):
        table.add_row(name, value)
    table.add_section()
    parts = memory_parts(config, counts.total)
    for name, size in parts.items():
        table.add_row(f"memory, {name}", gib(size))
    table.add_row("memory of one process, without activations", gib(sum(parts.values())))
    return table


def memory_parts(config: RunConfig, parameters: int) -> dict[str, int]:
    """Bytes that one process holds for the whole run.

    Muon keeps one fp32 state and AdamW two; nearly every parameter is Muon's, so the optimizer is
    counted with one, embedding and head with two.
    """
    low = config.precision == "bf16"
    adamw = 2 * config.model.vocab_size * config.model.hidden_size
    parts = {
        "weights": parameters * (2 if low else 4),
        "gradients, fp32": parameters * 4,
        "optimizer states, fp32": (parameters + adamw) * 4,
    }
    if low:
        parts["master weights, fp32"] = parameters * 4
    return parts


def gib(size: int) -> str:
    """Bytes as GiB, or MiB below one of them."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
