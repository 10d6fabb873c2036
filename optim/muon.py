"""Muon's update as pure functions (the Muon section of the V4 report, arXiv 2606.19348).

    M ← μM + G,   O = NS(μM + G),   W ← W(1 − ηλ) − η · rms · sqrt(max(R, C)) · O

W is one logically independent matrix, G its gradient, M its momentum, μ the momentum's decay, η the
learning rate, λ the weight decay, rms the RMS of an update and NS the Newton–Schulz iterations.
Functions take stacks of matrices; the model's table of parameters says which parameters these are,
and optim/optimizer.py batches them.

Letters: N matrices of R rows and C columns.
"""

import torch
from torch import Tensor

from optim.config import MuonConfig
from optim.newton_schulz import hybrid_steps, newton_schulz, polar_express_steps
from optim.syrk import Syrk, syrk_

Tensors = tuple[Tensor, ...] | list[Tensor]
"""Tensors as torch's foreach functions take them."""


def momentum_at(config: MuonConfig, step: int) -> float:
    """Returns μ of update `step`, counted from 0: linear from `momentum_start`, then constant."""
    if step >= config.momentum_warmup_steps:
        return config.momentum
    share = step / config.momentum_warmup_steps
    return config.momentum_start + share * (config.momentum - config.momentum_start)


def nesterov_(gradients: Tensors, momenta: Tensors, mu: float) -> None:
    """Updates the momenta, and replaces the gradients by Nesterov's directions μM + G."""
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, gradients)
    torch._foreach_add_(gradients, momenta, alpha=mu)


def orthogonal_update(direction_NRC: Tensor, config: MuonConfig, syrk: Syrk = syrk_) -> Tensor:
    """Returns the update at learning rate 1, [N, R, C] fp32: NS(direction) scaled to the set RMS.

    A semi-orthogonal [R, C] matrix has root mean square 1/sqrt(max(R, C)), so the factor gives
    every full-rank update the same RMS, whatever its shape.
    """
    dtype = newton_schulz_dtype(config, direction_NRC.device)
    if config.newton_schulz == "polar_express":
        steps = polar_express_steps(config.polar_express_steps)
    else:
        steps = hybrid_steps(config.coarse_steps, config.fine_steps)
    update_NRC = newton_schulz(direction_NRC, steps, dtype, config.gram, syrk).float()
    return update_NRC.mul_(config.update_rms * max(direction_NRC.shape[-2:]) ** 0.5)


def apply_updates_(
    weights: Tensors, updates: Tensors, learning_rate: float, weight_decay: float
) -> None:
    """Applies decoupled weight decay, then each update, in place on the fp32 weights."""
    torch._foreach_mul_(weights, 1.0 - learning_rate * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-learning_rate)


def newton_schulz_dtype(config: MuonConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype that `config.newton_schulz_precision` means on `device`."""
    if config.newton_schulz_precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if config.newton_schulz_precision == "fp32" else torch.bfloat16
