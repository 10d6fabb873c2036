"""Compressor, norms, rotations, residual streams, SwiGLU, combine and cross-entropy.

n rows; T tokens; D the hidden width; N streams; F an expert's inner width; V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.exchange import EntryKind, layer_type_of
from model.kernel_cases.case import Case, Function, MakeCase, Sizes, Work, layers_of
from model.kernels.compressor import pool_windows
from model.kernels.compressor.naive import naive_pool_windows
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.cross_entropy.eager import eager_softmax_loss
from model.kernels.cross_entropy.naive import naive_linear_cross_entropy, naive_softmax_loss
from model.kernels.hyper_connection import collapse_streams, read_streams, write_streams
from model.kernels.hyper_connection.naive import (
    naive_collapse_streams,
    naive_read_streams,
    naive_write_streams,
)
from model.kernels.norm import rms_norm, rotate
from model.kernels.norm.naive import naive_rms_norm, naive_rotate
from model.kernels.operations import Choice
from model.kernels.permute import unpermute_rows
from model.kernels.permute.naive import naive_unpermute_rows
from model.kernels.swiglu import clamped_swiglu
from model.kernels.swiglu.naive import naive_clamped_swiglu

IGNORE_INDEX = -100
_NAIVE_ROWS = 333
"""Rows of an operation that treats each by itself, where the truth loops over them."""


def _rows(sizes: Sizes) -> int:
    return min(sizes.tokens, _NAIVE_ROWS) if sizes.dense else sizes.tokens


_ENTRIES: tuple[EntryKind, ...] = ("csa", "hca", "index")


def compressor_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the pooling of each compressor that the model has, the indexer's included."""
    for entries in _ENTRIES:
        if layer_type_of(entries) in sizes.config.layer_types:
            yield partial(compressor_case, sizes, entries)


def compressor_case(sizes: Sizes, kind_of_entries: EntryKind) -> Case:
    """Makes the pooling of windows to one kind of entries."""

    kind = layer_type_of(kind_of_entries)
    config, draw, m = sizes.config, sizes.draw(), sizes.config.compress_ratio(kind)
    entries, tokens = sizes.layout.entries(m), sizes.tokens
    where: Any = (entries.first_token_C, entries.has_previous_C, kind == "csa")
    dim = config.index_head_dim if kind_of_entries == "index" else config.head_dim
    width = dim * (2 if kind == "csa" else 1)
    leaves = {
        name: draw(rows, width, dtype=torch.float32)
        for name, rows in (("values", tokens), ("gates", tokens), ("bias", m))
    }
    pooled, moved = tokens / m * dim * 4, 2.0 * tokens * width * 4

    return Case(
        "indexer" if kind_of_entries == "index" else f"{kind} layers",
        leaves,
        lambda choice: lambda *x: partial(pool_windows, choice=choice)(*x, *where),
        naive=(lambda *x: naive_pool_windows(*x, *where)) if sizes.dense else None,
        weight=layers_of(config, kind),
        forward=Work(5.0 * tokens * width, moved + pooled),
        backward=Work(10.0 * tokens * width, 2 * moved + pooled),
    )


def norm_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields norms of hidden states, low-rank queries, keys and entries, and a rotation.

    Keys and entries are rotated as well.
    """
    config = sizes.config
    rotary = config.qk_rope_head_dim
    for width in dict.fromkeys((config.hidden_size, config.q_lora_rank)):
        yield partial(norm_case, sizes, width, 0, sizes.dtype)
    yield lambda: norm_case(sizes, config.head_dim, rotary, sizes.dtype)
    widths = [config.head_dim] * bool({"csa", "hca"} & set(config.layer_types))
    widths += [config.index_head_dim] * ("csa" in config.layer_types)
    for width in dict.fromkeys(widths):
        yield partial(norm_case, sizes, width, rotary, torch.float32)
    if "csa" in config.layer_types:
        yield lambda: rotation_case(sizes)


def norm_case(sizes: Sizes, dim: int, rotary: int, dtype: torch.dtype) -> Case:
    """Makes the RMS norm of rows of this width and dtype, rotated if ``rotary`` is not 0."""

    draw, rows, eps = sizes.draw(), _rows(sizes), sizes.config.rms_norm_eps
    leaves = {"rows": draw(rows, dim, dtype=dtype), "weight": draw(dim, dtype=torch.float32)}
    rotation = draw.rotation(rows, rotary) if rotary else None

    def arguments(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        # The result has the activations' dtype, or that of a comparison in fp32.
        return x, weight, eps, rotation, sizes.dtype if x.dtype == dtype else x.dtype

    moved = 2.0 * rows * dim
    name = f"norm of {dim} dims" + (f" and rotation of {rotary}" if rotary else "")
    return Case(
        name + (", fp32" if dtype != sizes.dtype else ""),
        leaves,
        lambda choice: lambda *x: partial(rms_norm, choice=choice)(*arguments(*x)),
        naive=(lambda x, w: naive_rms_norm(x, w, eps, rotation)) if sizes.dense else None,
        weight=2.0 * len(sizes.config.layer_types),
        forward=Work(5 * moved, 2 * moved),
        backward=Work(12 * moved, 3 * moved),
    )


def rotation_case(sizes: Sizes) -> Case:
    """Makes the rotation of the indexer's queries."""

    config, draw, rows = sizes.config, sizes.draw(), _rows(sizes)
    x = draw(rows, config.index_n_heads, config.index_head_dim)
    rotation = draw.rotation(rows, config.qk_rope_head_dim)
    moved = 2.0 * x.numel() * x.element_size()
    return Case(
        f"rotation of {config.index_n_heads} heads",
        {"rows": x},
        lambda choice: lambda x: rotate(x, rotation, choice),
        naive=(lambda x: naive_rotate(x, rotation)) if sizes.dense else None,
        weight=layers_of(config, "csa"),
        forward=Work(0.0, moved),
        backward=Work(0.0, moved),
    )


def hyper_connection_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields reading and writing the streams, and their sum before the head."""
    yield lambda: read_case(sizes, head=False)
    yield lambda: write_case(sizes)
    yield lambda: read_case(sizes, head=True)


def read_case(sizes: Sizes, head: bool) -> Case:
    """Makes a sub-layer's input, or the head's, from the streams, with the coefficients."""

    config, draw, tokens = sizes.config, sizes.draw(), _rows(sizes)
    dim, n = config.hidden_size, config.hc_mult
    out = n if head else (2 + n) * n
    fp32 = torch.float32
    leaves = {
        "streams": draw(tokens, n, dim),
        "projection": draw(out, n * dim, dtype=fp32, scale=(n * dim) ** -0.5),
        "base": draw(out, dtype=fp32),
        "scale": draw(1 if head else 3, dtype=fp32),
    }
    steps = None if head else config.hc_sinkhorn_iters
    eps: dict[str, Any] = {"norm_eps": config.rms_norm_eps, "hc_eps": config.hc_eps}

    def function(choice: Choice) -> Function:
        if steps is None:
            return partial(collapse_streams, **eps, choice=choice)
        return partial(read_streams, **eps, iterations=steps, choice=choice)

    def naive(*x: Any) -> Any:
        if steps is None:
            return naive_collapse_streams(*x, **eps)
        return naive_read_streams(*x, **(eps | {"iterations": steps}))

    return Case(
        "streams summed for the head" if head else "streams read",
        leaves,
        function,
        naive=naive if sizes.dense else None,
        outputs=("output",) if head else ("output", "post", "comb"),
        weight=1.0 if head else 2.0 * len(config.layer_types),
        forward=Work(2.0 * tokens * out * n * dim, 2.0 * tokens * dim * (n + 1)),
        backward=Work(4.0 * tokens * out * n * dim, 2.0 * tokens * dim * (2 * n + 1)),
    )


def write_case(sizes: Sizes) -> Case:
    """Makes the update of the streams after a sub-layer."""

    draw, tokens = sizes.draw(), _rows(sizes)
    dim, n = sizes.config.hidden_size, sizes.config.hc_mult
    leaves = {
        "streams": draw(tokens, n, dim),
        "y": draw(tokens, dim),
        "post": draw(tokens, n, dtype=torch.float32),
        "comb": draw(tokens, n, n, dtype=torch.float32),
    }
    return Case(
        "streams written",
        leaves,
        lambda choice: partial(write_streams, choice=choice),
        naive=naive_write_streams if sizes.dense else None,
        weight=2.0 * len(sizes.config.layer_types),
        forward=Work(2.0 * tokens * n * (n + 1) * dim, 2.0 * tokens * dim * (2 * n + 1)),
        backward=Work(4.0 * tokens * n * (n + 1) * dim, 2.0 * tokens * dim * (3 * n + 2)),
    )


def swiglu_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the routed experts' activation, with their rows' weights, and the shared one's."""
    for weighted in (True, False):
        yield partial(swiglu_case, sizes, weighted)


def swiglu_case(sizes: Sizes, weighted: bool) -> Case:
    """Makes the experts' activation; some of gate and up are beyond the limit."""

    config, draw, limit = sizes.config, sizes.draw(), sizes.config.swiglu_limit
    rows, inner = _rows(sizes), sizes.routed_inner if weighted else sizes.shared_inner
    rows *= config.num_experts_per_tok if weighted and not sizes.dense else 1
    leaves = {name: draw(rows, inner, scale=limit / 2) for name in ("gate", "up")}
    if weighted:
        leaves["weight"] = draw(rows, dtype=torch.float32)
    count = float(rows * inner)

    def arguments(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        return gate, up, limit, weight

    return Case(
        "routed experts" if weighted else "shared expert",
        leaves,
        lambda choice: lambda *x: partial(clamped_swiglu, choice=choice)(*arguments(*x)),
        naive=(lambda *x: naive_clamped_swiglu(*arguments(*x))) if sizes.dense else None,
        weight=len(config.layer_types),
        forward=Work(10 * count, 6 * count),
        backward=Work(25 * count, 10 * count),
    )


def permute_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the sum of every token's expert rows."""
    yield lambda: combine_case(sizes)


def combine_case(sizes: Sizes) -> Case:
    """Makes the sum of every token's expert rows, which lie in random order."""

    config, draw, tokens = sizes.config, sizes.draw(), _rows(sizes)
    dim, active = config.hidden_size, config.num_experts_per_tok
    # Some rows are padding, as between experts.
    y = draw(tokens * active + 15, dim)
    place = draw.permutation(len(y))[: tokens * active]
    token_of_row = torch.zeros(len(y), dtype=torch.int64, device=sizes.device)
    token_of_row[place] = torch.arange(len(place), device=sizes.device) // active

    def naive(y: Tensor) -> Tensor:
        return naive_unpermute_rows(y, place, tokens)

    return Case(
        "combine",
        {"rows": y},
        lambda choice: lambda y: unpermute_rows(y, token_of_row, place, tokens, choice),
        naive=naive if sizes.dense else None,
        differentiable=False,
        # The forward of the combine, and the backward of the dispatch.
        weight=2.0 * len(config.layer_types),
        forward=Work(float(tokens * active * dim), 2.0 * tokens * dim * (active + 1)),
    )


def cross_entropy_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the head with its loss, and at small sizes the softmax alone."""
    if sizes.dense:
        yield lambda: softmax_case(sizes)
    yield lambda: head_case(sizes)


def _targets(sizes: Sizes, tokens: int) -> Tensor:
    """Returns token ids, the first and last of the vocabulary among them; some are ignored."""
    vocab = sizes.config.vocab_size
    target_T = sizes.draw().integers(vocab, tokens)
    target_T[::7] = IGNORE_INDEX
    target_T[1::7] = vocab - 1
    return target_T


def softmax_case(sizes: Sizes) -> Case:
    """Makes loss and gradient of a chunk of logits."""

    tokens, vocab = min(_rows(sizes), 64), sizes.config.vocab_size
    target_T, denominator = _targets(sizes, tokens), float(tokens)

    def function(choice: Choice) -> Function:
        softmax: Any = eager_softmax_loss
        if choice.name == "triton":
            from model.kernels.cross_entropy import softmax_triton

            softmax = softmax_triton.softmax_loss
            softmax = partial(softmax, **choice.blocks)
        # The gradient may overwrite the logits.
        return lambda x: softmax(x.clone(), target_T, denominator, IGNORE_INDEX, True)

    def naive(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            loss_T = naive_softmax_loss(leaf, target_T, IGNORE_INDEX)
            (grad,) = torch.autograd.grad(loss_T.sum() / denominator, leaf)
        return loss_T.detach(), grad

    return Case(
        f"softmax over {vocab} tokens",
        {"logits": sizes.draw()(tokens, vocab, scale=8.0)},
        function,
        naive=naive,
        outputs=("loss", "gradient"),
        differentiable=False,
        weight=0.0,
    )


def head_case(sizes: Sizes) -> Case:
    """Makes the output head with its loss, forward and backward."""

    config, draw, tokens = sizes.config, sizes.draw(), _rows(sizes)
    dim, vocab = config.hidden_size, config.vocab_size
    target_T, denominator = _targets(sizes, tokens), float(tokens)

    def function(choice: Choice) -> Function:
        return lambda h, w: linear_cross_entropy(h, w, target_T, denominator, IGNORE_INDEX, choice)

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return naive_linear_cross_entropy(h, w, target_T, denominator, IGNORE_INDEX)

    return Case(
        "head and loss",
        {"hidden": draw(tokens, dim), "weight": draw(vocab, dim, scale=2 * dim**-0.5)},
        function,
        naive=naive if sizes.dense else None,
        rounds_within=True,  # the logits
        forward=Work(6.0 * tokens * dim * vocab, 2.0 * (2 * tokens * dim + 3 * vocab * dim)),
    )
