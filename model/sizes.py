"""How many parameters a model has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import V4Model


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained parameters; router biases and hash tables are not among them.

    Attributes:
        main: all of the model but MTP.
        mtp: what the MTP block adds. Embedding and head are the main model's.
        active: what one token multiplies with in matrix products of the main model: A of the E
            routed experts, the shared one, projections, routers, hyper-connections and the output
            head. The embedding, which is looked up, and vectors and tables that act element by
            element (norms, sinks, positional gate biases) are not counted.
    """

    main: int
    mtp: int
    active: int

    @property
    def total(self) -> int:
        """Everything that is trained."""
        return self.main + self.mtp


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts of the model that ``config`` describes, built on the meta device: nothing allocated.

    They give the sizes that V4's report and release print: 284B and 13B active for Flash.
    """
    with torch.device("meta"):
        model = V4Model(config)
    main = mtp = active = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            mtp += parameter.numel()
            continue
        main += parameter.numel()
        active += _active(name, parameter, config)
    return ParameterCounts(main, mtp, active)


def _active(name: str, parameter: Tensor, config: ModelConfig) -> int:
    if parameter.dim() < 2 or name == "embed.weight" or name.endswith(".ape"):
        return 0
    if ".experts." in name:
        return parameter.numel() // config.n_routed_experts * config.num_experts_per_tok
    return parameter.numel()
