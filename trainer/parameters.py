"""How many parameters a model has, counted on the meta device."""

from dataclasses import dataclass

import torch

from model import ModelConfig, V4Model


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, the router biases and hash tables not among them."""

    total: int
    """Everything that is trained, MTP included."""
    mtp: int
    """The part in the MTP block."""
    active: int
    """What one token goes through without MTP: of the routed experts, only the chosen ones."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts of the model that `config` describes; no memory is allocated for it."""
    with torch.device("meta"):
        model = V4Model(config)
    total = mtp = idle = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name.startswith("mtp."):
            mtp += parameter.numel()
        elif ".experts." in name:
            unused = config.n_routed_experts - config.num_experts_per_tok
            idle += parameter.numel() * unused // config.n_routed_experts
    return ParameterCount(total, mtp, total - mtp - idle)
