"""Initial values: functions of (seed, official name, expert), the same at every topology."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.parameter_spec import InitialValues
from model.parameters import official_name, spec_of, split_name
from model.router import balanced_table


class Shard(Protocol):
    """Which shard of a global parameter a rank holds."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the unsharded parameter."""

    @property
    def global_offset(self) -> tuple[int, ...]:
        """Index of the shard's first element in the unsharded parameter."""

    def shard(self, tensor: Tensor) -> Tensor:
        """Returns this rank's shard of a tensor of the global shape."""

    def matrix_shard(self, matrix: Tensor) -> Tensor:
        """Returns this rank's shard of one expert's matrix."""


def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    token_counts: Sequence[float] | None,
    shards: Mapping[str, Shard],
) -> None:
    """Fills every parameter and buffer of ``model`` in place, as the table of parameters says.

    "normal" draws from N(0, initializer_range²) (V3 §4.2), "hc_scale" is ``hc_init_scale``,
    "hc_base" is set by ``hyper_connection_bias``, and "balanced_table" balances the experts of a
    hash table by ``token_counts``. A parameter named in ``shards`` gets its shard of the values
    that the unsharded parameter would get.
    """
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            fill = _CONSTANTS.get(spec_of(name).initial)
            if fill is not None:
                tensor.fill_(fill(config))
            elif spec_of(name).initial == "hc_base":
                tensor.copy_(hyper_connection_bias(name, config))
            elif spec_of(name).initial == "balanced_table":
                sizes = (config.vocab_size, config.n_routed_experts, config.num_experts_per_tok)
                tensor.copy_(balanced_table(_generator(seed, name), *sizes, token_counts))
            else:
                _fill_normal(name, tensor, config, seed, shards.get(name))


_CONSTANTS: dict[InitialValues, Callable[[ModelConfig], float]] = {
    "ones": lambda config: 1.0,
    "zeros": lambda config: 0.0,
    "hc_scale": lambda config: config.hc_init_scale,
}


def _generator(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{official_name(name)}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _fill_normal(
    name: str, tensor: Tensor, config: ModelConfig, seed: int, shard: Shard | None
) -> None:
    shape = tensor.shape if shard is None else shard.global_shape
    is_unsharded = shard is None or shard.global_shape == tensor.shape
    if spec_of(name).stacked:
        first = 0 if shard is None else shard.global_offset[0]
        for expert, matrix in enumerate(tensor, start=first):
            values = _normal(_generator(seed, name, expert), shape[1:], config)
            matrix.copy_(values if shard is None or is_unsharded else shard.matrix_shard(values))
    else:
        values = _normal(_generator(seed, name), shape, config)
        tensor.copy_(values if shard is None or is_unsharded else shard.shard(values))


def _normal(generator: torch.Generator, shape: Sequence[int], config: ModelConfig) -> Tensor:
    return torch.randn(shape, generator=generator) * config.initializer_range


def hyper_connection_bias(name: str, config: ModelConfig) -> Tensor:
    """Returns the initial biases: close to a plain residual, with streams that differ.

    Sub-layer n reads mostly stream n mod N and writes to all streams with weight 1, and comb leaves
    each stream mostly as it is; the head reads all streams alike. The report does not give them.
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
