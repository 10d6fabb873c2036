"""Initial values: each a function of (seed, parameter name, expert), the same at every topology."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.parameter_entry import InitialValues
from model.parameters import entry_of, official_name, split_name
from model.router import balanced_table


class Part(Protocol):
    """Where a parameter lies in the whole one of which it is a part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole shape."""

    @property
    def offset(self) -> tuple[int, ...]:
        """Index of the part's first element in the whole."""

    def own(self, whole: Tensor) -> Tensor:
        """Returns the part of a tensor of the whole shape."""

    def own_matrix(self, matrix: Tensor) -> Tensor:
        """Returns the part of one of the whole's stacked matrices."""


def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    token_counts: Sequence[float] | None,
    parts: Mapping[str, Part],
) -> None:
    """Fill every parameter and buffer of ``model`` in place, as the table of parameters says.

    "normal" are normal numbers with ``initializer_range`` (V3 §4.2), "hc_scale" is
    ``hc_init_scale``, "hc_base" see ``hyper_connection_bias``, and "balanced_table" balances the
    experts of a hash table by ``token_counts``. Parameters named in ``parts`` are parts of whole
    ones and get their part of the same values.
    """
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            fill = _CONSTANTS.get(entry_of(name).initial)
            if fill is not None:
                tensor.fill_(fill(config))
            elif entry_of(name).initial == "hc_base":
                tensor.copy_(hyper_connection_bias(name, config))
            elif entry_of(name).initial == "balanced_table":
                sizes = (config.vocab_size, config.n_routed_experts, config.num_experts_per_tok)
                tensor.copy_(balanced_table(_generator(seed, name), *sizes, token_counts))
            else:
                _fill_normal(name, tensor, config, seed, parts.get(name))


_CONSTANTS: dict[InitialValues, Callable[[ModelConfig], float]] = {
    "ones": lambda config: 1.0,
    "zeros": lambda config: 0.0,
    "hc_scale": lambda config: config.hc_init_scale,
}


def _generator(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{official_name(name)}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _fill_normal(
    name: str, tensor: Tensor, config: ModelConfig, seed: int, part: Part | None
) -> None:
    shape = tensor.shape if part is None else part.shape
    whole = part is None or part.shape == tensor.shape
    if entry_of(name).stacked:
        first = 0 if part is None else part.offset[0]
        for expert, matrix in enumerate(tensor, start=first):
            values = _normal(_generator(seed, name, expert), shape[1:], config)
            matrix.copy_(values if part is None or whole else part.own_matrix(values))
    else:
        values = _normal(_generator(seed, name), shape, config)
        tensor.copy_(values if part is None or whole else part.own(values))


def _normal(generator: torch.Generator, shape: Sequence[int], config: ModelConfig) -> Tensor:
    return torch.randn(shape, generator=generator) * config.initializer_range


def hyper_connection_bias(name: str, config: ModelConfig) -> Tensor:
    """Returns biases with which a block starts as a plain residual and its streams differ.

    Sub-layer number n reads mostly stream n mod N, writes to all of them with weight 1, and each
    stream carries mostly itself; the head reads all streams alike. The report does not give them.
    """
    streams = config.hc_mult
    prefix, rest = split_name(name)
    if rest.startswith("hc_head"):
        return torch.full((streams,), _logit(1 / streams))
    layer = 0 if prefix.startswith("mtp.") else int(prefix.split(".")[1])
    sublayer = 2 * layer + rest.startswith("hc_ffn")
    main_read = config.hc_init_own_read
    pre = torch.full((streams,), _logit((1 - main_read) / max(streams - 1, 1)))
    pre[sublayer % streams] = _logit(main_read)
    post = torch.zeros(streams)
    comb = torch.eye(streams) * config.hc_init_comb_diagonal
    return torch.cat([pre, post, comb.flatten()])


def _logit(probability: float) -> float:
    probability = min(probability, 1 - 1e-4)
    return math.log(probability / (1 - probability))
