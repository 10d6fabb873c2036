"""Attention, entries' probability mass, indexer, its loss and compressor: tasks for a benchmark.

Inputs and implementations are those of model/kernel_cases, by which a check compares the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig
from model.kernel_cases import Case, Sizes, Work
from model.kernel_cases.attention import attention_case, mass_case
from model.kernel_cases.indexer import loss_case, selection_case
from model.kernel_cases.layers import compressor_case
from model.kernels.operations import Choice
from trainer.config import load_config

DEVICE, DTYPE = "cuda", torch.bfloat16
EAGER_ROWS, COMPILED_ROWS = 65536, 4096
"""The eager version loops on the host, and the compiler unrolls the loop: neither is timed on
longer rows."""
_MASS_ENTRIES = 4096
"""The KL target is evaluated for blocks of at most so many entries."""


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


def sizes_of(config: ModelConfig, row: int) -> Sizes:
    """Returns the sizes of one row that is one sample; what a deterministic run does is timed."""
    return Sizes(config, (row,), DTYPE, torch.device(DEVICE), deterministic=True)


def eager_versions(eager: Callable[..., Tensor], row: int) -> dict[str, Callable[..., Tensor]]:
    """Returns the eager version, plain and compiled, unless the row is too long for them."""
    versions: dict[str, Callable[..., Tensor]] = {}
    if row <= EAGER_ROWS:
        versions["eager"] = eager
    if row <= COMPILED_ROWS:
        versions["eager, compiled"] = torch.compile(eager)
    return versions


def task_of(case: Case, name: str, row: int, **others: Callable[..., Tensor]) -> Task:
    """Makes a task of a case; of several outputs the first is timed. ``others`` are added.

    ``row`` decides whether eager versions are timed; 0 where the eager version has no loop.
    """
    assert case.forward is not None

    def first(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(*x: Tensor) -> Tensor:
            out = function(*x)
            return out[0] if isinstance(out, tuple) else out

        return call

    implementations = {"triton": first(case.function(Choice("triton"))), **others}
    implementations |= eager_versions(first(case.eager), row)
    leaves = list(case.leaves.values())
    return Task(name, leaves, implementations, case.forward, case.backward)


def attention_task(config: ModelConfig, kind: Any, row: int) -> Task:
    """Makes the core attention of one layer type, on one row that is one sample."""
    sizes, k = sizes_of(config, row), None
    if kind == "csa" and row // config.csa_compress_ratio > config.index_topk:
        k = config.index_topk
    task = task_of(attention_case(sizes, kind, k), f"attention, {kind}", row)
    if k is None:
        task.implementations["flex"] = flex(config, kind, row)
    else:
        atomics = attention_case(sizes, kind, k, deterministic=False)
        task.implementations["triton, atomics"] = atomics.function(Choice("triton"))
    return task


def mass_task(config: ModelConfig, row: int) -> Task:
    """Makes attention and the KL target over the first block of entries."""
    stop = min(row // config.csa_compress_ratio, _MASS_ENTRIES)
    case = mass_case(sizes_of(config, row), None, stop)
    return task_of(case, "attention and entries' probability mass", row)


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
    return task_of(selection_case(sizes_of(config, row), config.index_topk), "indexer", row)


def indexer_loss_tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the objective of the dense and the sparse phase."""
    return [lambda k=k: indexer_loss_task(config, row, k) for k in (None, config.index_topk)]


def indexer_loss_task(config: ModelConfig, row: int, k: int | None) -> Task:
    """Makes the indexer's objective over all entries or k of them; the target is not computed."""
    form = "dense" if k is None else "selected"
    return task_of(loss_case(sizes_of(config, row), k), f"indexer loss, {form}", row)


def compressor_task(config: ModelConfig, kind: Any, row: int) -> Task:
    """Makes the pooling of one kind of compressor."""
    return task_of(compressor_case(sizes_of(config, row), kind), f"compressor, {kind}", 0)


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
