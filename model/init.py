"""Initial values: each a function of (seed, parameter name, expert), the same at every topology."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.router import balanced_table


class Part(Protocol):
    """Where a parameter lies in the whole one of which it is a part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    @property
    def offset(self) -> tuple[int, ...]:
        """Index of its first element in the whole."""

    def own(self, whole: Tensor) -> Tensor:
        """Its part of a tensor of the whole shape."""

    def own_matrix(self, matrix: Tensor) -> Tensor:
        """Its part of one of the whole's stacked matrices."""


def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    token_counts: Sequence[float] | None,
    parts: Mapping[str, Part],
) -> None:
    """Fill every parameter and buffer of ``model`` in place.

    Matrices are normal with ``initializer_range`` (V3), norms 1, sinks and positional gate biases
    0, hyper-connections as ``hyper_connection_bias`` says. ``token_counts`` balances the hash
    tables by frequency. Parameters named in ``parts`` are parts of whole ones and get their part
    of the same values.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill_parameter(name, parameter, config, seed, parts.get(name))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                generator = _generator(seed, name)
                sizes = (config.vocab_size, config.n_routed_experts, config.num_experts_per_tok)
                buffer.copy_(balanced_table(generator, *sizes, token_counts))
            else:
                buffer.zero_()


def _generator(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _fill_parameter(
    name: str, parameter: Tensor, config: ModelConfig, seed: int, part: Part | None
) -> None:
    shape = parameter.shape if part is None else part.shape
    whole = part is None or part.shape == parameter.shape
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith(("attn_sink", "ape")):
        parameter.zero_()
    elif name.endswith(("hc_attn_scale", "hc_ffn_scale", "hc_head_scale")):
        parameter.fill_(config.hc_init_scale)
    elif name.endswith(("hc_attn_base", "hc_ffn_base", "hc_head_base")):
        parameter.copy_(hyper_connection_bias(name, config))
    elif ".experts." in name:
        first = 0 if part is None else part.offset[0]
        for expert, matrix in enumerate(parameter, start=first):
            values = _normal(_generator(seed, name, expert), shape[1:], config)
            matrix.copy_(values if part is None or whole else part.own_matrix(values))
    else:
        values = _normal(_generator(seed, name), shape, config)
        parameter.copy_(values if part is None or whole else part.own(values))


def _normal(generator: torch.Generator, shape: Sequence[int], config: ModelConfig) -> Tensor:
    return torch.randn(shape, generator=generator) * config.initializer_range


def hyper_connection_bias(name: str, config: ModelConfig) -> Tensor:
    """Static biases with which a block starts as a plain residual with streams told apart.

    Sub-layer number n reads mostly stream n mod N, writes to all of them with weight 1, and each
    stream carries mostly itself; the head reads all streams alike. The report leaves them open.
    """
    streams = config.hc_mult
    if name.endswith("hc_head_base"):
        return torch.full((streams,), _logit(1 / streams))
    layer = 0 if name.startswith("mtp.") else int(re.findall(r"\d+", name)[0])
    sublayer = 2 * layer + ("hc_ffn" in name)
    own = config.hc_init_own_read
    pre = torch.full((streams,), _logit((1 - own) / max(streams - 1, 1)))
    pre[sublayer % streams] = _logit(own)
    post = torch.zeros(streams)
    comb = torch.eye(streams) * config.hc_init_comb_diagonal
    return torch.cat([pre, post, comb.flatten()])


def _logit(probability: float) -> float:
    probability = min(probability, 1 - 1e-4)
    return math.log(probability / (1 - probability))
