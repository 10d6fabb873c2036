"""Manifold-constrained hyper-connections: the streams' coefficients and their mixing.

mHC paper (arXiv 2512.24880) and report §2.2. All coefficients are fp32. Backward recomputes them
from the M projections w, so the streams are the only [T, N, D] tensor that a sub-layer saves. In
formulas X_j is stream j.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from model.kernels.hyper_connection.eager import eager_read_streams, eager_write_streams
from model.kernels.operations import EAGER, Choice


def read_streams(
    streams_TND: Tensor,
    fn: Tensor,
    base_M: Tensor,
    scale: Tensor,
    *,
    norm_eps: float,
    hc_eps: float,
    iterations: int,
    choice: Choice = EAGER,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a sub-layer's input, and the coefficients with which its output is written back.

    Args:
        streams_TND: the residual streams.
        fn: [M, N·D], rows in the order pre N, post N, comb N².
        base_M: static biases.
        scale: [3], the gating factors of pre, post and comb.

    Returns:
        x [T, D] = Σ_j pre_j X_j in the streams' dtype; post [T, N] and comb [T, N, N] in fp32.
    """
    if choice.name == "triton":
        from model.kernels.hyper_connection import streams_triton

        return streams_triton.read_streams(
            streams_TND,
            fn,
            base_M,
            scale,
            norm_eps=norm_eps,
            hc_eps=hc_eps,
            iterations=iterations,
            **choice.blocks,
        )
    return _read(choice)(streams_TND, fn, base_M, scale, norm_eps, hc_eps, iterations)


def write_streams(
    streams_TND: Tensor,
    y_TD: Tensor,
    post_TN: Tensor,
    comb_TNN: Tensor,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes X'_k = post_k · y + Σ_j comb[j, k] · X_j, [T, N, D].

    The sum runs over comb's first index.
    """
    if choice.name == "triton":
        from model.kernels.hyper_connection import streams_triton

        return streams_triton.write_streams(streams_TND, y_TD, post_TN, comb_TNN, **choice.blocks)
    if choice.name == "compile":
        from model.kernels.hyper_connection import compiled  # imports torch's compiler

        return compiled.write_streams(streams_TND, y_TD, post_TN, comb_TNN)
    if choice.name == "tile_kernels":
        from model.kernels.hyper_connection import tile_kernels_library

        return tile_kernels_library.write_streams(streams_TND, y_TD, post_TN, comb_TNN)
    return eager_write_streams(streams_TND, y_TD, post_TN, comb_TNN)


def collapse_streams(
    streams_TND: Tensor,
    fn: Tensor,
    base_N: Tensor,
    scale: Tensor,
    *,
    norm_eps: float,
    hc_eps: float,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes the head's weighted sum of the streams, [T, D]: weights σ(scale · w + base) + eps.

    ``fn`` is [N, N·D] and ``scale`` [1].
    """
    if choice.name == "triton":
        from model.kernels.hyper_connection import streams_triton

        return streams_triton.read_streams(
            streams_TND,
            fn,
            base_N,
            scale,
            norm_eps=norm_eps,
            hc_eps=hc_eps,
            iterations=None,
            **choice.blocks,
        )
    return _read(choice)(streams_TND, fn, base_N, scale, norm_eps, hc_eps, None)


def _read(choice: Choice) -> Callable[..., Any]:
    """Returns the function that reads the streams, of an implementation other than Triton."""
    if choice.name == "compile":
        from model.kernels.hyper_connection import compiled  # imports torch's compiler

        return compiled.read_streams
    if choice.name == "tile_kernels":
        from model.kernels.hyper_connection import tile_kernels_library

        return tile_kernels_library.read_streams
    return eager_read_streams
