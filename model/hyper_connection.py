"""Residual streams joined to a sub-layer by manifold-constrained hyper-connections (report 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.pointwise import Operations


def register_hyper_connection(module: nn.Module, name: str, config: ModelConfig) -> None:
    """Give ``module`` the parameters ``{name}_fn``, ``{name}_base``, ``{name}_scale``, in fp32."""
    streams = config.hc_mult
    rows = (2 + streams) * streams
    _register(module, name, rows, streams * config.hidden_size, scales=3)


def register_hyper_head(module: nn.Module, config: ModelConfig) -> None:
    """Give ``module`` the parameters ``hc_head_fn``, ``hc_head_base``, ``hc_head_scale``."""
    _register(module, "hc_head", config.hc_mult, config.hc_mult * config.hidden_size, scales=1)


def _register(module: nn.Module, name: str, rows: int, columns: int, scales: int) -> None:
    for suffix, shape in (("fn", (rows, columns)), ("base", (rows,)), ("scale", (scales,))):
        parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        module.register_parameter(f"{name}_{suffix}", parameter)


def read(
    module: nn.Module, name: str, config: ModelConfig, streams_TND: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A sub-layer's input [T, D], and post [T, N] and comb [T, N, N] to write its output with."""
    return _operations(module).read_streams(
        streams_TND,
        *_parameters(module, name),
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
        iterations=config.hc_sinkhorn_iters,
    )


def head_of_streams(module: nn.Module, config: ModelConfig, streams_TND: Tensor) -> Tensor:
    """The weighted sum of the streams that goes to the final norm, [T, D]."""
    return _operations(module).collapse_streams(
        streams_TND,
        *_parameters(module, "hc_head"),
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
    )


def _operations(module: nn.Module) -> Operations:
    operations = module.operations
    assert isinstance(operations, Operations)
    return operations


def _parameters(module: nn.Module, name: str) -> list[Tensor]:
    return [getattr(module, f"{name}_{suffix}") for suffix in ("fn", "base", "scale")]
