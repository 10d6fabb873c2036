"""Norms, residual streams, experts' rows and the head's loss as tasks for a benchmark."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.attention_tasks import DEVICE, Task, Work, eager_versions, randn
from model import ModelConfig
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.hyper_connection.eager import eager_read_streams, eager_write_streams
from model.kernels.norm.eager import eager_rms_norm
from model.kernels.operations import Choice
from model.kernels.permute.eager import eager_unpermute
from model.kernels.swiglu.eager import eager_clamped_swiglu
from model.transformer import IGNORE_INDEX

WHOLE_ROWS = 16384
"""The logits of longer rows do not fit."""


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the tasks other than attention."""
    makers = (norm_task, read_task, write_task, swiglu_task, collect_task, head_task)
    return [lambda make=make: make(config, row) for make in makers]


def norm_task(config: ModelConfig, row: int) -> Task:
    """Makes the RMS norm before a sub-layer."""
    from model.kernels.norm import norm_triton

    dim, eps = config.hidden_size, config.rms_norm_eps
    leaves = [randn(row, dim), randn(dim, dtype=torch.float32)]
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda x, w: norm_triton.rms_norm(x, w, eps, None, x.dtype)
    }
    implementations |= eager_versions(lambda x, w: eager_rms_norm(x, w, eps, None, x.dtype), 0)
    moved = 2.0 * row * dim
    return Task(
        "norm", leaves, implementations, Work(5 * moved, 2 * moved), Work(12 * moved, 3 * moved)
    )


def read_task(config: ModelConfig, row: int) -> Task:
    """Makes a sub-layer's input from the streams, with the coefficients."""
    from model.kernels.hyper_connection import streams_triton

    dim, n = config.hidden_size, config.hc_mult
    rows = (2 + n) * n
    eps = {"norm_eps": config.rms_norm_eps, "hc_eps": config.hc_eps}
    leaves = [randn(row, n, dim), randn(rows, n * dim, dtype=torch.float32) * (n * dim) ** -0.5]
    leaves += [randn(rows, dtype=torch.float32), randn(3, dtype=torch.float32)]
    steps = config.hc_sinkhorn_iters
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda *x: streams_triton.read_streams(*x, **eps, iterations=steps)[0]
    }
    implementations |= eager_versions(
        lambda *x: eager_read_streams(*x, config.rms_norm_eps, config.hc_eps, steps)[0], 0
    )
    forward = Work(2.0 * row * rows * n * dim, 2.0 * row * dim * (n + 1))
    backward = Work(4.0 * row * rows * n * dim, 2.0 * row * dim * (2 * n + 1))
    return Task("streams read", leaves, implementations, forward, backward)


def write_task(config: ModelConfig, row: int) -> Task:
    """Makes the update of the streams after a sub-layer."""
    from model.kernels.hyper_connection import streams_triton

    dim, n = config.hidden_size, config.hc_mult
    leaves = [randn(row, n, dim), randn(row, dim), randn(row, n, dtype=torch.float32)]
    leaves.append(randn(row, n, n, dtype=torch.float32))
    implementations: dict[str, Callable[..., Tensor]] = {"triton": streams_triton.write_streams}
    implementations |= eager_versions(eager_write_streams, 0)
    forward = Work(2.0 * row * n * (n + 1) * dim, 2.0 * row * dim * (2 * n + 1))
    backward = Work(4.0 * row * n * (n + 1) * dim, 2.0 * row * dim * (3 * n + 2))
    return Task("streams written", leaves, implementations, forward, backward)


def swiglu_task(config: ModelConfig, row: int) -> Task:
    """Makes the routed experts' activation with the rows' weights."""
    from model.kernels.swiglu import swiglu_triton

    rows, inner, limit = row * config.num_experts_per_tok, config.moe_intermediate_size, 10.0
    leaves = [randn(rows, inner), randn(rows, inner), randn(rows, dtype=torch.float32)]
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda g, u, w: swiglu_triton.clamped_swiglu(g, u, limit, w)
    }
    implementations |= eager_versions(lambda g, u, w: eager_clamped_swiglu(g, u, limit, w), 0)
    count = float(rows * inner)
    return Task(
        "SwiGLU", leaves, implementations, Work(10 * count, 6 * count), Work(25 * count, 10 * count)
    )


def collect_task(config: ModelConfig, row: int) -> Task:
    """Makes the sum of every token's expert rows, which are in random order."""
    from model.kernels.permute import unpermute_triton

    dim, active = config.hidden_size, config.num_experts_per_tok
    place = torch.randperm(row * active, device=DEVICE)
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda y: unpermute_triton.unpermute(y, place, row)
    }
    implementations |= eager_versions(lambda y: eager_unpermute(y, place, row), 0)
    work = Work(float(row * active * dim), 2.0 * row * dim * (active + 1))
    return Task("sum of experts' rows", [randn(row * active, dim)], implementations, work, None)


def head_task(config: ModelConfig, row: int) -> Task:
    """Makes the output head with its cross-entropy; its result is the hidden states' gradient."""
    dim, vocab = config.hidden_size, config.vocab_size
    leaves = [randn(row, dim), randn(vocab, dim) * dim**-0.5]
    target = torch.randint(vocab, (row,), device=DEVICE)

    def of(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def gradient(hidden: Tensor, weight: Tensor) -> Tensor:
            hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
            return torch.autograd.grad(loss(hidden, weight), [hidden, weight])[0]

        return gradient

    def chunked(choice: Choice) -> Callable[..., Tensor]:
        return of(lambda h, w: linear_cross_entropy(h, w, target, row, IGNORE_INDEX, choice))

    implementations = {name: chunked(Choice(name)) for name in ("triton", "eager")}
    if row <= WHOLE_ROWS:
        implementations["torch, whole logits"] = of(lambda h, w: F.cross_entropy(h @ w.T, target))
    work = Work(6.0 * row * dim * vocab, 2.0 * (2 * row * dim + 3 * vocab * dim))
    return Task("head and cross-entropy", leaves, implementations, work, None)
