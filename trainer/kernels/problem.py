"""The sizes of a run at which its kernels are checked. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trainer.config import RunConfig
from trainer.kernels.choose import run_operations, unsupported_operations
from trainer.kernels.verdict import Problem

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 8192
"""Maximum of a check: more tokens add only time and larger addresses, which are tested at a
million tokens without a GPU (tests/model/kernels/test_addresses.py)."""


def problem_of(config: RunConfig, device: torch.device) -> Problem:
    """Returns what to check on `device` for this run: all operations that Triton can run there.

    Heads and inner widths of experts are those of one rank, tokens those of one rank's largest
    microbatch, rounded down to a power of two: other microbatches need no other check.
    """
    parallel, rows = config.segment.parallel, config.segment.largest.rows
    model = config.model.model_dump(mode="json")
    for name in ("num_attention_heads", "o_groups"):
        model[name] //= parallel.tensor
    # Samples of the checked microbatch are as long as the run's rows, also on several ranks.
    model["max_position_embeddings"] = min(model["max_position_embeddings"], rows.seq_len)
    tokens = min(rows.micro_batch_size * rows.seq_len // parallel.context, MAX_TOKENS)
    unsupported = unsupported_operations(config, device)
    operations = [name for name in run_operations(config) if name not in unsupported]
    has_syrk = "syrk" in operations
    return Problem(
        model=model,
        dtype="float32" if config.precision == "fp32" else "bfloat16",
        micro_tokens=1 << (tokens.bit_length() - 1),
        operations=tuple(operations),
        matrices=_matrices(config) if has_syrk else (),
        matrix_dtype=_matrix_dtype(config, device) if has_syrk else "bfloat16",
        deterministic=config.deterministic,
        tensor=parallel.tensor,
        expert_tensor=parallel.expert_tensor,
    )


def needs_check(config: RunConfig, device: torch.device) -> bool:
    """Whether the run's kernels depend on a check of `device`."""
    if device.type != "cuda":
        return False
    operations = set(run_operations(config)) - unsupported_operations(config, device).keys()
    return any(config.kernel_setting(name) not in ("eager", "compile") for name in operations)


def _matrix_dtype(
    config: RunConfig, device: torch.device
) -> Literal["bfloat16", "float16", "float32"]:
    """Returns the dtype in which the optimizer multiplies matrices on `device`."""
    import torch

    from optim.muon import newton_schulz_dtype

    dtype = newton_schulz_dtype(config.optim.muon, device)
    return "float32" if dtype == torch.float32 else "bfloat16"


def _matrices(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """Returns the distinct sizes, wide or square, of the matrices that Muon updates."""
    from model.parameters import parameter_table
    from trainer.optimizer_table import table_of_run

    shapes = {name: line.shape for name, line in parameter_table(config.model).items()}
    sizes = {
        (min(entry.matrices[1:]), max(entry.matrices[1:]))
        for entry in table_of_run(config, shapes)
        if entry.matrices is not None
    }
    return tuple(sorted(sizes))
