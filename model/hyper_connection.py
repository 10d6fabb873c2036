"""Residual streams: manifold-constrained hyper-connections (report §2.2, arXiv 2512.24880).

Letters: T tokens, N streams, D hidden size. All parameters and coefficients are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.hyper_connection import collapse_streams, read_streams, write_streams
from model.kernels.operations import ALL_EAGER, Kernels


class _Coefficients(nn.Module):
    """Parameters of the coefficients ``scale · (fn · z) + base``, with z = RMS-normed vec(X)."""

    def __init__(
        self,
        config: ModelConfig,
        num_coefficients: int,
        num_scales: int,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.choice = kernels.hyper_connections
        self.norm_eps, self.hc_eps = config.rms_norm_eps, config.hc_eps
        columns = config.hc_mult * config.hidden_size
        self.fn = nn.Parameter(torch.empty(num_coefficients, columns, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty(num_coefficients, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(num_scales, dtype=torch.float32))


class HyperConnection(_Coefficients):
    """Connects the streams X [T, N, D] to one sub-layer x -> y.

    With w = fn · z, whose (2 + N) · N rows are N for pre, N for post and N² for comb:

        pre  = σ(scale_0 · w_pre + base_pre) + ε            x    = Σ_j pre_j · X_j
        post = 2 σ(scale_1 · w_post + base_post)            X'_k = post_k · y + Σ_j comb_jk · X_j
        comb = Sinkhorn(softmax(scale_2 · w_comb + base_comb) + ε)

    The implementation is in model/kernels/hyper_connection.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels = ALL_EAGER) -> None:
        super().__init__(config, (2 + config.hc_mult) * config.hc_mult, 3, kernels)
        self.iterations = config.hc_sinkhorn_iters

    def read(self, streams_TND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the sub-layer's input x [T, D], and post [T, N] and comb [T, N, N]."""
        return read_streams(
            streams_TND,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.norm_eps,
            hc_eps=self.hc_eps,
            iterations=self.iterations,
            choice=self.choice,
        )

    def write(self, streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
        """Returns the streams X' after the sub-layer."""
        return write_streams(streams_TND, y_TD, post_TN, comb_TNN, self.choice)


class HyperConnectionHead(_Coefficients):
    """Collapses the streams to Σ_j (σ(scale · w_j + base_j) + ε) · X_j for the final norm."""

    def __init__(self, config: ModelConfig, kernels: Kernels = ALL_EAGER) -> None:
        super().__init__(config, config.hc_mult, 1, kernels)

    def forward(self, streams_TND: Tensor) -> Tensor:
        """[T, N, D] to [T, D]."""
        return collapse_streams(
            streams_TND,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.norm_eps,
            hc_eps=self.hc_eps,
            choice=self.choice,
        )
