"""A model as it is stored: what is known before its weights are read, and the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Tokenizer
from model import ModelConfig
from model.config import AttentionMode
from model.parameters import memory_name
from trainer.config import Quantisation
from trainer.parallel.plan import LocalModel


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model, and how it was trained.

    Attributes:
        tensors: whole, on the host, under official names.
        step: of the run's checkpoint; None for a Hugging Face folder.
        quantisation: with which it was trained.
        experts_are_rounded: whether the tensors of experts are as that rounds them.
        attention: of CSA layers, as generation uses them.
    """

    tensors: Mapping[str, Tensor]
    step: int | None
    quantisation: Quantisation
    experts_are_rounded: bool
    attention: AttentionMode


@dataclass(frozen=True)
class StoredModel:
    """A run folder's newest checkpoint, or a Hugging Face folder; `read` reads its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    read: Callable[[], StoredWeights]


ModelReader = Callable[[str], StoredModel]
"""Opens a folder; raises one of USER_ERRORS where it is no model."""


@torch.no_grad()
def copy_weights(local: LocalModel, tensors: Mapping[str, Tensor]) -> None:
    """Copies this rank's shards of whole tensors, which are under official names, into its model.

    Tensors that the model does not have, such as another stage's, are left out.
    """
    state = local.model.state_dict()
    for official, tensor in tensors.items():
        name, expert = memory_name(official)
        if name not in state:
            continue
        placement = local.placements[name]
        if expert is None:
            state[name].copy_(placement.shard(tensor))
        elif 0 <= (index := expert - placement.global_offset[0]) < placement.local_shape[0]:
            state[name][index].copy_(placement.matrix_shard(tensor))
