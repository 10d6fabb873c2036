"""The one transfer of a step's metrics from the device to the host.

Letters: L layers (+ MTP), E routed experts.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from trainer.engine import StepLosses
from trainer.step import StepResult


def to_host(
    model: ModelConfig, losses: StepLosses, norm: Tensor, learning_rate: float, phase: int
) -> StepResult:
    """Copies the metrics of a step to the host, finite or not; waits for the device.

    `norm` is that of the gradient; `phase` the number of the step's phase.
    """
    load_LE = losses.expert_load / losses.expert_load.mean(dim=1, keepdim=True).clamp(min=1.0)
    learned_LE = load_LE[model.num_hash_layers :]
    max_learned = learned_LE.max() if len(learned_LE) else load_LE.new_zeros(())
    scalars = (losses.loss, losses.lm, losses.mtp, losses.balance, losses.indexer, norm)
    loads = (load_LE.max(), max_learned, load_LE.min())
    packed = torch.stack([x.double() for x in (*scalars, *loads, *losses.top1_weight_share)])
    loss, lm, mtp, balance, indexer, grad_norm, *rest = packed.tolist()
    load_max, learned_max, load_min, *top1_weight_share = rest
    return StepResult(
        learning_rate=learning_rate,
        phase=phase,
        loss=loss,
        lm_loss=lm,
        mtp_loss=mtp,
        balance_loss=balance,
        indexer_loss=indexer,
        grad_norm=grad_norm,
        expert_load_max=load_max,
        expert_load_min=load_min,
        max_expert_share=learned_max * model.num_experts_per_tok / model.n_routed_experts,
        top1_weight_share=top1_weight_share[model.num_hash_layers :],
        tokens=losses.counts.routed,
        flops=losses.flops,
        work_seconds=losses.messages.work_seconds,
    )
