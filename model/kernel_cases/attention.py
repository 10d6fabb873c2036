"""Core attention in its three modes, and the entries' probability mass.

T queries; H heads; K their width; C entries; k selected entries of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.config import LayerType, ModelConfig
from model.kernel_cases.case import (
    Blocks,
    Case,
    Function,
    MakeCase,
    Sizes,
    Work,
    layers_of,
    random_selection,
    sees,
    visible_entries,
)
from model.kernels.attention import (
    AttentionInputs,
    attention_with_lse2,
    entry_probability_mass,
)
from model.kernels.attention.naive import (
    naive_attention,
    naive_probabilities,
    naive_selection_mask,
)
from model.kernels.operations import BLOCKS_OF_TRITON, Choice

_NAIVE_HEADS = 8
"""Heads whose dense probabilities are in memory at once."""


def attention_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields every layer type's attention, to entry ranges and selected entries, and the mass."""
    kinds = sorted({"window", *sizes.config.layer_types})
    for kind in kinds:
        selects = kind == "csa" and _selected_entries(sizes) is not None
        # A model attends to selected entries as soon as one token sees more than it may select.
        if sizes.dense or not selects:
            yield partial(attention_case, sizes, kind, None)
        if not selects:
            continue
        for deterministic in (False, True) if sizes.dense else (sizes.deterministic,):
            yield partial(attention_case, sizes, "csa", _selected_entries(sizes), deterministic)
    if "csa" in kinds and sizes.dense:
        for k in dict.fromkeys([None, _selected_entries(sizes)]):
            yield partial(mass_case, sizes, k)


def block_choices(config: ModelConfig) -> tuple[Blocks, ...]:
    """Returns block sizes to try, the kernels' own first."""
    from model.kernels.attention.parts_triton import blocks_for

    try:
        own = blocks_for(config.head_dim)
    except ValueError:
        return ({},)  # the kernel itself says which widths it supports
    ordered = replace(own, ordered=1)
    choices = [own, ordered, replace(own, keys=32, dq_keys=32)]
    if config.head_dim >= 256:
        one_ahead = {"stages": 2, "dq_stages": 2, "dk_stages": 2}
        wide = replace(own, keys=64, dq_keys=32, dk_rows=32, **one_ahead)
        small = replace(wide, rows=32, keys=32, dq_rows=32, dk_rows=16, dk_keys=32)
        choices = [
            own,
            ordered,
            wide,
            replace(wide, keys=32, dk_rows=16),  # B200, whose operands lie in memory
            replace(own, dq_rows=32, dq_keys=32, stages=3),  # A100, two steps ahead
            replace(wide, dq_rows=32),  # A100
            small,
            replace(small, dq_rows=16),  # consumer Blackwell and Ada
        ]
    return tuple(asdict(blocks) for blocks in dict.fromkeys(choices))


def _selected_entries(sizes: Sizes) -> int | None:
    """Returns k; None if no token sees more than k, so that all entries are attended to.

    Where the truth is dense, k is halved until some token sees more.
    """
    k, most = sizes.config.index_topk, int(visible_entries(sizes, "csa").max(initial=0))
    if sizes.dense and most > 1:
        k = min(k, most // 2)
    return k if most > k else None


def _inputs(
    sizes: Sizes, kind: LayerType, k: int | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Returns the leaves, and the selected entries if k is given."""
    config, draw, ranges = sizes.config, sizes.draw(), sizes.ranges(kind)
    heads, dim = config.num_attention_heads, config.head_dim
    leaves = {"queries": draw(sizes.tokens, heads, dim), "keys": draw(sizes.tokens, dim)}
    selected = None
    if kind != "window":
        leaves["entries"] = draw(sizes.entries(kind), dim)
        if k is not None:
            assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
            selected = random_selection(draw, ranges.entry_start_T, ranges.entry_end_T, k)
    leaves["sink"] = draw(heads, dtype=torch.float32)
    return leaves, selected


class _Call:
    """Builds the arguments of one layer type's attention from the leaves."""

    def __init__(self, sizes: Sizes, kind: LayerType, selected_Tk: Tensor | None) -> None:
        self.config, self.selected_Tk = sizes.config, selected_Tk
        self.ranges, self.rotation_Tr = sizes.ranges(kind), sizes.rotation(kind)

    def inputs(self, q: Tensor, kv: Tensor, *rest: Tensor) -> AttentionInputs:
        """Leaves are queries, keys, entries if any, and the sink."""
        entries = rest[0] if len(rest) == 2 else None
        config, where = self.config, (self.rotation_Tr, self.ranges, self.selected_Tk)
        sizes: Any = {"window": config.sliding_window, "norm_eps": config.rms_norm_eps}
        return AttentionInputs(q, kv, entries, rest[-1], *where, **sizes)

    def dense(self, q: Tensor, kv: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        """Returns the arguments of `naive_attention` after q, but for sink, rotation and eps."""
        entries = rest[0] if len(rest) == 2 else None
        index = torch.arange(len(kv), device=kv.device)
        sees_token_TL = sees(index, self.ranges.window_start_T, index + 1)
        if entries is None:
            return kv, None, sees_token_TL, None
        assert self.ranges.entry_start_T is not None and self.ranges.entry_end_T is not None
        index = torch.arange(len(entries), device=kv.device)
        sees_entry_TC = sees(index, self.ranges.entry_start_T, self.ranges.entry_end_T)
        if self.selected_Tk is not None:
            sees_entry_TC = sees_entry_TC & naive_selection_mask(self.selected_Tk, len(entries))
        return kv, entries, sees_token_TL, sees_entry_TC

    def naive(self, *leaves: Tensor) -> Tensor:
        """Runs `naive_attention` a few heads at a time; backward computes them again."""
        kv, entries, sees_token_TL, sees_entry_TC = self.dense(*leaves)
        parts = [
            checkpoint(
                naive_attention,
                leaves[0][:, heads],
                kv,
                entries,
                leaves[-1][heads],
                self.rotation_Tr,
                sees_token_TL,
                sees_entry_TC,
                self.config.rms_norm_eps,
                use_reentrant=False,
            )
            for heads in _heads(leaves[0])
        ]
        return torch.cat(parts, 1)

    def naive_mass(self, *leaves: Tensor) -> Tensor:
        """Sums the entries' probabilities over heads, [T, C] or [T, k]."""
        kv, entries, sees_token_TL, sees_entry_TC = self.dense(*leaves)
        where = (self.rotation_Tr, sees_token_TL, sees_entry_TC, self.config.rms_norm_eps)
        mass_TC: Tensor | None = None
        for heads in _heads(leaves[0]):
            some = naive_probabilities(
                leaves[0][:, heads],
                kv,
                entries,
                leaves[-1][heads],
                *where,
            )
            part = some[..., len(kv) :].sum(1)
            mass_TC = part if mass_TC is None else mass_TC + part
        assert mass_TC is not None
        if self.selected_Tk is None:
            return mass_TC
        index_Tk = self.selected_Tk.long()
        return mass_TC.gather(1, index_Tk.clamp(min=0)).masked_fill(index_Tk < 0, 0.0)


def _heads(q_THK: Tensor) -> list[slice]:
    return [slice(h, h + _NAIVE_HEADS) for h in range(0, q_THK.shape[1], _NAIVE_HEADS)]


def attention_case(
    sizes: Sizes, kind: LayerType, k: int | None, deterministic: bool = True
) -> Case:
    """Makes one layer type's attention; with k, to k random entries of those that a query sees.

    Gradients of selected entries are the same at every run only if ``deterministic``.
    """
    from model.kernels.attention import flash_mla_triton, forward_triton, parts_triton

    leaves, selected = _inputs(sizes, kind, k)
    call = _Call(sizes, kind, selected)

    def function(choice: Choice) -> Function:
        if choice.name not in BLOCKS_OF_TRITON:
            return lambda *x: attention_with_lse2(call.inputs(*x), choice)[0]
        blocks = parts_triton.Blocks(**choice.blocks) if choice.blocks else None
        module = forward_triton if choice.name == "triton" else flash_mla_triton
        return lambda *x: module.attention(
            call.inputs(*x), deterministic=deterministic, blocks=blocks
        )[0]

    pairs = _pairs(sizes, kind, k)
    moved = 2.0 * leaves["queries"].numel() * leaves["queries"].element_size()
    name = f"{kind} layers"
    if selected is not None:
        name += ", selected entries" + (" in a fixed order" if deterministic else "")
    return Case(
        name,
        leaves,
        function,
        naive=call.naive if sizes.dense else None,
        repeatable=selected is None or deterministic,
        rounds_within=True,  # probabilities and the rotated keys
        weight=layers_of(sizes.config, kind),
        forward=Work(4 * pairs, moved),
        backward=Work(10 * pairs, 2 * moved),
    )


def mass_case(sizes: Sizes, k: int | None, stop: int | None = None) -> Case:
    """Makes attention and the mass that it gives to the entries, or to the first ``stop`` of them.

    The mass is computed from attention's own log-sum-exp, which is thereby compared as well.
    """
    leaves, selected = _inputs(sizes, "csa", k)
    call = _Call(sizes, "csa", selected)

    def function(choice: Choice) -> Function:
        def mass(*x: Tensor) -> Tensor:
            inputs = call.inputs(*x)
            _, lse2 = attention_with_lse2(inputs, choice)
            return entry_probability_mass(inputs, lse2, stop=stop, choice=choice)

        return mass

    return Case(
        "probability mass of " + ("all entries" if selected is None else "selected entries"),
        leaves,
        function,
        naive=call.naive_mass if sizes.dense else None,
        differentiable=False,
        rounds_within=True,  # the rotated keys
        weight=0.0,
        forward=Work(6 * _pairs(sizes, "csa", k), 4.0 * leaves["queries"].numel()),
    )


def _pairs(sizes: Sizes, kind: LayerType, k: int | None) -> float:
    """Returns H · K times the number of (query, key) pairs."""
    layout, config = sizes.layout, sizes.config
    visible = (layout.host_position_T + 1).clip(max=config.sliding_window).astype(float)
    if kind != "window":
        entries = visible_entries(sizes, kind)
        visible = visible + (entries if k is None else entries.clip(max=k))
    return config.num_attention_heads * config.head_dim * float(visible.sum())
