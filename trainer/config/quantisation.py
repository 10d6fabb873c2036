"""Checks of quantisation-aware training, and of training in FP8. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from model.kernels.block_sizes import FP8_BLOCK, MXFP4_BLOCK
from trainer.config.parallel import ParallelConfig
from trainer.config.recipe import Segment
from trainer.config.settings import RunSettings


def quantisation_problems(config: RunSettings) -> Iterator[str]:
    """Yields the settings that are incompatible with the quantisation of the run or a phase.

    - `quantisation` other than none needs `engine` = native.
    - `phases.quantisation` other than none needs `engine` = native.
    - `model.hidden_size` and `model.moe_intermediate_size` are multiples of 32 with `quantisation`.
    - `model.index_head_dim` is a power of two, at least 32, with `quantisation` and CSA layers.
    """
    values = {"quantisation": config.quantisation}
    for number, phase in enumerate(config.phases):
        values[f"phases.{number}.quantisation"] = phase.quantisation or "none"
    for field, value in values.items():
        if value != "none":
            yield from _problems(config, f"{field} = {value}")
            return


def _problems(config: RunSettings, what: str) -> Iterator[str]:
    if config.engine != "native":
        yield f"{what} is not supported with engine = {config.engine}; use engine = native"
    model = config.model
    for field in ("hidden_size", "moe_intermediate_size"):
        size = getattr(model, field)
        if size % MXFP4_BLOCK:
            yield f"model.{field} = {size} should be a multiple of {MXFP4_BLOCK} for {what}"
    index = model.index_head_dim
    if "csa" in model.layer_types and (index % MXFP4_BLOCK or index & (index - 1)):
        yield (
            f"model.index_head_dim = {index} should be a power of two and at least {MXFP4_BLOCK} "
            f"for {what}, since a Hadamard transform precedes the rounding of queries and "
            "keys"
        )


def mxfp4_degree_problems(config: RunSettings, segment: Segment) -> Iterator[str]:
    """Yields degrees that are incompatible with quantisation in a segment.

    - `parallel.expert_tensor` splits `model.moe_intermediate_size` into multiples of 32 with
      `quantisation`.
    """
    inner, parts = config.model.moe_intermediate_size, segment.parallel.expert_tensor
    if any(phase.quantised for phase in segment.phases) and inner % (MXFP4_BLOCK * parts):
        yield (
            f"parallel.expert_tensor = {parts} splits model.moe_intermediate_size = {inner} inside "
            f"a block of {MXFP4_BLOCK}, which quantisation does not allow; it should divide "
            f"{inner // MXFP4_BLOCK}"
        )


def fp8_problems(config: RunSettings) -> Iterator[str]:
    """Yields an engine that is incompatible with `precision = fp8`.

    - `precision` = fp8 needs `engine` = native.
    """
    if config.precision == "fp8" and config.engine != "native":
        yield f"precision = fp8 is not supported with engine = {config.engine}; use engine = native"


def fp8_degree_problems(config: RunSettings, parallel: ParallelConfig) -> Iterator[str]:
    """Yields degrees that are incompatible with `precision = fp8`.

    - `parallel.tensor` and `parallel.expert_tensor` split no block of 128 values with `precision` =
      fp8.
    """
    if config.precision != "fp8":
        return
    model = config.model
    inner = model.moe_intermediate_size
    for axis, sizes in (
        (
            "tensor",
            {
                "model.num_attention_heads x head_dim": model.num_attention_heads * model.head_dim,
                "model.o_groups x o_lora_rank": model.o_groups * model.o_lora_rank,
                "model.moe_intermediate_size": inner,
            },
        ),
        ("expert_tensor", {"model.moe_intermediate_size": inner}),
    ):
        degree = getattr(parallel, axis)
        for field, size in sizes.items():
            if degree > 1 and size % (FP8_BLOCK * degree):
                yield (
                    f"parallel.{axis} = {degree} splits {field} = {size} inside a block of "
                    f"{FP8_BLOCK}, which precision = fp8 does not allow; it should be 1"
                    + f" or divide {size // FP8_BLOCK}"
                    * (size % FP8_BLOCK == 0)
                )
