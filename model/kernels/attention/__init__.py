"""Core attention: one softmax over a window of tokens and compressed entries, with a sink.

Report §2.3. Queries are RMS-normalised per head and rotated here, and the output is rotated back
here: as separate memory-bound passes they would cost far more than their arithmetic.
Backward recomputes the probabilities block by block, so nothing quadratic is ever stored.

T queries; H heads; K their width; C compressed entries; k selected entries of a query; R rotary
dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.kernels.attention.eager import eager_attention, eager_entry_probability_mass
from model.kernels.attention.inputs import AttentionInputs
from model.kernels.attention.ranges import AttentionRanges
from model.kernels.operations import EAGER, Choice

if TYPE_CHECKING:
    from model.kernels.attention.parts_triton import Blocks

__all__ = [
    "AttentionInputs",
    "AttentionRanges",
    "attention_with_lse2",
    "entry_probability_mass",
]


def attention_with_lse2(inputs: AttentionInputs, choice: Choice = EAGER) -> tuple[Tensor, Tensor]:
    """Computes softmax(q·kv / sqrt(K)) · kv over window, entries and sink, and rotates it back.

    Keys are the values.
    The output's last R dims are rotated by the inverse of the query's rotation.

    Returns:
        [T, H, K] in q's dtype; and lse2, fp32 [T, H], from which `entry_probability_mass` recovers
        probabilities: the base-2 logarithm of the softmax's denominator, sink included, without a
        gradient.
    """
    if choice.name == "triton":
        from model.kernels.attention import forward_triton

        deterministic = torch.are_deterministic_algorithms_enabled()
        return forward_triton.attention(inputs, deterministic=deterministic, blocks=_blocks(choice))
    if choice.name == "flash_mla":
        from model.kernels.attention import flash_mla_triton

        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_mla_triton.attention(
            inputs, deterministic=deterministic, blocks=_blocks(choice)
        )
    return eager_attention(inputs)


@torch.no_grad()
def entry_probability_mass(
    inputs: AttentionInputs,
    lse2_TH: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes the attention probability of each entry, summed over heads: the KL target's mass.

    Args:
        inputs: those of the `attention_with_lse2` call; keys and sink are not read.
        lse2_TH: as `attention_with_lse2` returned it, so that the denominator includes the window
            and the sink.
        start, stop: the range of entries to compute, used only when ``inputs.selected_Tk`` is None;
            all by default.

    Returns:
        fp32 [T, k], or [T, stop - start] with zeros where a query does not see an entry.
    """
    if choice.name in ("triton", "flash_mla"):
        from model.kernels.attention import probability_mass_triton

        return probability_mass_triton.entry_probability_mass(
            inputs, lse2_TH, start=start, stop=stop, blocks=_blocks(choice)
        )
    return eager_entry_probability_mass(inputs, lse2_TH, start=start, stop=stop)


def _blocks(choice: Choice) -> Blocks | None:
    """Returns the kernels' block sizes; None for their own."""
    from model.kernels.attention.parts_triton import Blocks

    return Blocks(**choice.blocks) if choice.blocks else None
