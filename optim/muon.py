"""Muon's update as pure functions (the Muon section of the V4 report, arXiv 2606.19348).

    M ← μM + G,   O = NS(μM + G),   W ← W(1 − ηλ) − η · rms · sqrt(max(R, C)) · O

W is one logically independent matrix; every function here takes a stack of them, [N, R, C].
Which parameters these are stands in the model's table of parameters, how they are batched in
optim/optimizer.py.
"""

import torch
from torch import Tensor

from optim.config import MuonConfig
from optim.newton_schulz import hybrid_steps, newton_schulz, polar_express_steps

Tensors = tuple[Tensor, ...] | list[Tensor]
"""What torch's foreach functions take."""


def momentum_at(config: MuonConfig, step: int) -> float:
    """μ of update number `step`, counted from 0: linear from `momentum_start`, then constant."""
    if step >= config.momentum_warmup_steps:
        return config.momentum
    share = step / config.momentum_warmup_steps
    return config.momentum_start + share * (config.momentum - config.momentum_start)


def look_ahead_(out: Tensors, momenta: Tensors, gradients: Tensors, mu: float) -> None:
    """Nesterov's directions μM + G into `out`, where M already holds this step's gradient."""
    torch._foreach_copy_(out, gradients)
    torch._foreach_add_(out, momenta, alpha=mu)


def orthogonal_update(direction_NRC: Tensor, config: MuonConfig) -> Tensor:
    """What is subtracted from the weights at learning rate 1: NS(direction) at the set RMS.

    A semi-orthogonal [R, C] matrix has root mean square 1/sqrt(max(R, C)), so the factor gives
    every full-rank update the same RMS, whatever its shape. fp32, whatever the precision inside.
    """
    dtype = newton_schulz_dtype(config, direction_NRC.device)
    if config.newton_schulz == "polar_express":
        steps = polar_express_steps(config.polar_express_steps)
    else:
        steps = hybrid_steps(config.coarse_steps, config.fine_steps)
    update_NRC = newton_schulz(direction_NRC, steps, dtype, config.gram).float()
    return update_NRC.mul_(config.update_rms * max(direction_NRC.shape[-2:]) ** 0.5)


def apply_updates_(
    weights: Tensors, updates: Tensors, learning_rate: float, weight_decay: float
) -> None:
    """Decoupled decay, then the update of each, in place on the (fp32) weights."""
    torch._foreach_mul_(weights, 1.0 - learning_rate * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-learning_rate)


def newton_schulz_dtype(config: MuonConfig, device: torch.device) -> torch.dtype:
    """The precision that `config.newton_schulz_precision` means on `device`."""
    if config.newton_schulz_precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if config.newton_schulz_precision == "fp32" else torch.bfloat16
