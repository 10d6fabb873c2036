"""Norms, residual streams, experts' rows and the head's loss as tasks for a benchmark."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.attention_tasks import DEVICE, Task, Work, randn, sizes_of, task_of
from model import ModelConfig
from model.kernel_cases import layers
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.operations import Choice
from model.transformer import IGNORE_INDEX

WHOLE_ROWS = 16384
"""The logits of longer rows do not fit."""


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the tasks other than attention."""
    sizes = sizes_of(config, row)
    cases = {
        "norm": lambda: layers.norm_case(sizes, config.hidden_size, 0, sizes.dtype),
        "streams read": lambda: layers.read_case(sizes, head=False),
        "streams written": lambda: layers.write_case(sizes),
        "SwiGLU": lambda: layers.swiglu_case(sizes, weighted=True),
        "sum of experts' rows": lambda: layers.combine_case(sizes),
    }
    makers = [lambda n=name, make=make: task_of(make(), n, 0) for name, make in cases.items()]
    return [*makers, lambda: head_task(config, row)]


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
