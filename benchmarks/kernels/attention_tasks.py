"""Attention, entries' probability mass, indexer, its loss and compressor: tasks for a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig, SampleLayout
from model.kernels.attention import AttentionInputs
from model.kernels.attention.eager import eager_attention, eager_entry_probability_mass
from model.kernels.compressor.eager import eager_pool_windows
from model.kernels.indexer import IndexerInputs, KLTarget, indexer_objective
from model.kernels.indexer.select_eager import eager_select_topk
from model.kernels.operations import Choice
from model.positions import Positions
from trainer.config import load_config

DEVICE, DTYPE = "cuda", torch.bfloat16
EAGER_ROWS, COMPILED_ROWS = 65536, 4096
"""The eager version loops on the host, and the compiler unrolls the loop: neither is timed on
longer rows."""


@dataclass(frozen=True)
class Work:
    """The minimum FLOPs and bytes of one pass."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Task:
    """One operation at one size: its differentiable inputs, and implementations by name."""

    name: str
    leaves: list[Tensor]
    implementations: dict[str, Callable[..., Tensor]]
    forward: Work
    backward: Work | None


def load(name: str) -> ModelConfig:
    """Reads the model of a shipped config."""
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    return load_config(path).model


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Returns normal random numbers on the device."""
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def eager_versions(eager: Callable[..., Tensor], row: int) -> dict[str, Callable[..., Tensor]]:
    """Returns the eager version, plain and compiled, unless the row is too long for them."""
    versions: dict[str, Callable[..., Tensor]] = {}
    if row <= EAGER_ROWS:
        versions["eager"] = eager
    if row <= COMPILED_ROWS:
        versions["eager, compiled"] = torch.compile(eager)
    return versions


def attention_task(config: ModelConfig, kind: Any, row: int) -> Task:
    """Makes the core attention of one layer type, on one row that is one sample."""
    from model.kernels.attention import forward_triton

    positions = Positions.of_microbatch(config, SampleLayout.from_lengths([[row]], device=DEVICE))
    ranges, rotation = positions.ranges(kind), positions.rotation(kind)
    heads, dim, window = config.num_attention_heads, config.head_dim, config.sliding_window
    leaves = [randn(row, heads, dim), randn(row, dim), randn(heads, dtype=torch.float32)]
    keys = np.minimum(np.arange(row) + 1, window).astype(float)
    selected = None
    if kind != "window":
        visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
        leaves.insert(2, randn(row // config.compress_ratio(kind), dim))
        if kind == "csa" and visible.max() > config.index_topk:
            selected = random_choice(ranges.entry_end_T, row, config.index_topk)
            visible = np.minimum(visible, config.index_topk)
        keys += visible

    def inputs(q: Tensor, kv: Tensor, *rest: Tensor) -> AttentionInputs:
        entries = rest[0] if len(rest) == 2 else None
        where = rotation, ranges, selected
        eps = config.rms_norm_eps
        return AttentionInputs(q, kv, entries, rest[-1], *where, window=window, norm_eps=eps)

    def triton(deterministic: bool) -> Callable[..., Tensor]:
        return lambda *x: forward_triton.attention(inputs(*x), deterministic=deterministic)[0]

    def eager(*x: Tensor) -> Tensor:
        return eager_attention(inputs(*x))[0]

    implementations: dict[str, Callable[..., Tensor]] = {"triton": triton(True)}
    if selected is not None:
        implementations["triton, atomics"] = triton(False)
    implementations |= eager_versions(eager, row)
    if selected is None:
        implementations["flex"] = flex(config, kind, row)
    pairs = heads * dim * float(keys.sum())
    moved = 2.0 * leaves[0].numel() * leaves[0].element_size()
    forward, backward = Work(4 * pairs, moved), Work(10 * pairs, 2 * moved)
    return Task(f"attention, {kind}", leaves, implementations, forward, backward)


def mass_task(config: ModelConfig, row: int) -> Task:
    """Makes the KL target over the first block of entries, at most 4096 of them."""
    from model.kernels.attention import probability_mass_triton

    positions = Positions.of_microbatch(config, SampleLayout.from_lengths([[row]], device=DEVICE))
    ranges, rotation = positions.ranges("csa"), positions.rotation("csa")
    heads, dim = config.num_attention_heads, config.head_dim
    leaves = [randn(row, heads, dim), randn(row // config.csa_compress_ratio, dim)]
    unused = randn(row, dim), randn(heads, dtype=torch.float32)  # keys and sink
    lse2 = torch.full((row, heads), 12.0, device=DEVICE)
    block = {"stop": min(len(leaves[1]), 4096)}
    visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
    pairs = heads * dim * float(np.minimum(visible, block["stop"]).sum())

    def inputs(q: Tensor, entries: Tensor) -> AttentionInputs:
        kv, sink = unused
        sizes: Any = {"window": config.sliding_window, "norm_eps": config.rms_norm_eps}
        return AttentionInputs(q, kv, entries, sink, rotation, ranges, **sizes)

    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda q, e: probability_mass_triton.entry_probability_mass(
            inputs(q, e), lse2, **block
        )
    }
    implementations |= eager_versions(
        lambda q, e: eager_entry_probability_mass(inputs(q, e), lse2, **block), row
    )
    moved = leaves[0].numel() * 2.0 + row * block["stop"] * 4
    work = Work(2 * pairs, moved)
    return Task("entries' probability mass", leaves, implementations, work, None)


def random_choice(end_T: Tensor | None, row: int, k: int) -> Tensor:
    """Draws k of the entries that each query sees, or all if it sees no more, [row, k]."""
    assert end_T is not None
    out = torch.full((row, k), -1, dtype=torch.int32, device=DEVICE)
    for rows in torch.arange(row, device=DEVICE).split(1024):
        end = end_T[rows, None]
        order = torch.rand(len(rows), max(int(end.max()), k), device=DEVICE)
        order.masked_fill_(torch.arange(order.shape[1], device=DEVICE) >= end, -1)
        best = order.topk(k)
        out[rows] = best.indices.masked_fill(best.values < 0, -1).int()
    return out


def flex(config: ModelConfig, kind: Any, row: int) -> Callable[..., Tensor]:
    """Returns FlexAttention over tokens and entries in one array, without norm and rotation.

    The sink is applied afterwards, through the log-sum-exp that FlexAttention returns.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = config.sliding_window
    ratio = 0 if kind == "window" else config.compress_ratio(kind)
    count = row + (row // ratio if ratio else 0)

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        token = (s <= t) & (s > t - window)
        if not ratio:
            return token
        return torch.where(s < row, token, s - row < (t + 1) // ratio)

    compiled = torch.compile(flex_attention)
    masks: list[Any] = []

    def call(q: Tensor, kv: Tensor, *rest: Tensor) -> Tensor:
        if not masks:  # compiled, since otherwise all of [row, count] would be materialised
            masks.append(
                create_block_mask(visible, None, None, row, count, device=DEVICE, _compile=True)
            )
        keys = torch.cat([kv, rest[0]]) if ratio else kv
        keys = keys[None, None]
        queries = q.transpose(0, 1)[None]
        out, lse = compiled(
            queries, keys, keys, block_mask=masks[0], enable_gqa=True, return_lse=True
        )
        share = torch.sigmoid(lse - rest[-1][None, :, None])
        return (out * share[..., None]).to(q.dtype)[0].transpose(0, 1)

    return call


def indexer_task(config: ModelConfig, row: int) -> Task:
    """Makes the indexer's selection."""
    from model.kernels.indexer import select_triton

    ranges = Positions.of_microbatch(
        config, SampleLayout.from_lengths([[row]], device=DEVICE)
    ).ranges("csa")
    heads, dim, k = config.index_n_heads, config.index_head_dim, config.index_topk
    inputs = [randn(row, heads, dim), randn(row // config.csa_compress_ratio, dim)]
    inputs.append(randn(row, heads, dtype=torch.float32))
    visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
    pairs = float(visible[visible > k].sum())
    moved = inputs[0].numel() * 2.0 + inputs[2].numel() * 4 + row * k * 4
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda *x: select_triton.select_topk(IndexerInputs(*x), ranges, k)
    }
    implementations |= eager_versions(
        lambda *x: eager_select_topk(IndexerInputs(*x), ranges, k), row
    )
    work = Work(2 * heads * dim * pairs, moved)
    return Task("indexer", inputs, implementations, work, None)


def indexer_loss_tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the objective of the dense and the sparse phase."""
    return [lambda k=k: indexer_loss_task(config, row, k) for k in (None, config.index_topk)]


def indexer_loss_task(config: ModelConfig, row: int, k: int | None) -> Task:
    """Makes the indexer's objective over all entries or k of them, with a KL target of ones.

    Forward computes the gradients as well, backward only scales them. The target is the separate
    task "entries' probability mass".
    """
    ranges = Positions.of_microbatch(
        config, SampleLayout.from_lengths([[row]], device=DEVICE)
    ).ranges("csa")
    heads, dim = config.index_n_heads, config.index_head_dim
    leaves = [randn(row, heads, dim), randn(row // config.csa_compress_ratio, dim)]
    leaves.append(randn(row, heads, dtype=torch.float32) * (heads * dim) ** -0.5)
    visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
    selected = None if k is None else random_choice(ranges.entry_end_T, row, k)
    pairs = float(visible.sum() if k is None else np.minimum(visible, k).sum())

    def mass(rows: slice, columns: slice) -> Tensor:
        return torch.ones(rows.stop - rows.start, columns.stop - columns.start, device=DEVICE)

    target, share = KLTarget(mass, ranges, selected), torch.full((row,), 1 / row, device=DEVICE)

    def triton(*x: Tensor) -> Tensor:
        return indexer_objective(IndexerInputs(*x), target, share, Choice("triton"))

    def eager(*x: Tensor) -> Tensor:
        return indexer_objective(IndexerInputs(*x), target, share)

    implementations = {"triton": triton, **eager_versions(eager, row)}
    moved = leaves[0].numel() * 2.0 + leaves[2].numel() * 4 + 4 * pairs
    forward = Work(8 * heads * dim * pairs, 3 * moved)
    backward = Work(0.0, 2.0 * sum(x.numel() * x.element_size() for x in leaves))
    form = "dense" if k is None else "selected"
    return Task(f"indexer loss, {form}", leaves, implementations, forward, backward)


def compressor_task(config: ModelConfig, kind: Any, row: int) -> Task:
    """Makes the pooling of one kind of compressor."""
    from model.kernels.compressor import pool_triton

    m = config.compress_ratio(kind)
    entries = SampleLayout.from_lengths([[row]], device=DEVICE).entries(m)
    where = (entries.first_token_C, entries.has_previous_C, kind == "csa")
    width = config.head_dim * (2 if kind == "csa" else 1)
    leaves = [randn(rows, width, dtype=torch.float32) for rows in (row, row, m)]
    pooled = row / m * config.head_dim * 4
    moved = 2.0 * row * width * 4
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda *x: pool_triton.pool_windows(*x, *where)
    }
    # It has no loop, so the length of the row does not matter.
    implementations |= eager_versions(lambda *x: eager_pool_windows(*x, *where), 0)
    forward = Work(5.0 * row * width, moved + pooled)
    backward = Work(10.0 * row * width, 2 * moved + pooled)
    return Task(f"compressor, {kind}", leaves, implementations, forward, backward)


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the tasks, since only one at a time fits in memory."""
    makers: list[Callable[[], Task]] = []
    for kind in sorted({"window", *config.layer_types}):
        makers.append(lambda kind=kind: attention_task(config, kind, row))
    makers.append(lambda: mass_task(config, row))
    makers.append(lambda: indexer_task(config, row))
    makers += indexer_loss_tasks(config, row)
    for kind in ("csa", "hca"):
        makers.append(lambda kind=kind: compressor_task(config, kind, row))
    return makers
