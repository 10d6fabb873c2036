"""Reverse KL over the whole vocabulary: what distillation on the student's own samples minimises.

KL(student || teacher) = Σ_v p_v (log p_v - log q_v) at every token, from the hidden states and
heads of both, which may have other widths. Logits exist for one chunk of tokens at a time, in
fp32: three arrays of `chunk_tokens` x vocabulary, whatever the number of tokens.

Letters: T tokens (queries of this rank), n of a chunk, D hidden size of the student, d of the
teacher, v vocabulary of this tensor rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.cross_entropy import chunk_tokens
from trainer.parallel.collectives import all_reduce_, all_reduce_max_
from trainer.parallel.grid import Axis
from trainer.post.vocabulary import add_products, wide_logits
from trainer.process.errors import PostTrainingError


def reverse_kl(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    teacher_hidden_Td: Tensor,
    teacher_weight_vd: Tensor,
    token_weight_T: Tensor,
    denominator: float,
    axis: Axis,
) -> Tensor:
    """Computes Σ_t token_weight_t · KL(student_t || teacher_t) / denominator, fp32.

    Tensor ranks hold parts of the vocabulary, the same of both heads. Every rank returns the same
    loss; as in the cross-entropy, the gradient of `hidden_TD` is partial: it comes from this rank's
    part of the vocabulary alone. The teacher gets no gradient.

    Args:
        token_weight_T: 0 where nothing is learned, as in prompts and padding.
        denominator: the sum of the weights over the whole global batch, so that losses of
            microbatches and ranks add up to one mean.
        axis: the tensor ranks.

    Raises:
        PostTrainingError: the two have different vocabularies.
    """
    if len(weight_vD) != len(teacher_weight_vd):
        student, teacher = (len(part) * axis.size for part in (weight_vD, teacher_weight_vd))
        raise PostTrainingError(
            f"the teacher's vocabulary has {teacher:,} tokens, the student's {student:,}; they "
            "should have the same tokenizer"
        )
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_vD.requires_grad)
    total: Tensor = _ReverseKL.apply(
        hidden_TD,
        weight_vD,
        teacher_hidden_Td,
        teacher_weight_vd,
        token_weight_T,
        denominator,
        axis,
        needs_grad,
    )
    return total


class _ReverseKL(torch.autograd.Function):
    # Gradients are computed while a chunk's logits are in memory, and scaled in backward.

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weight: Tensor,
        denominator: float,
        axis: Axis,
        needs_grad: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        step = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            scale_n = token_weight[rows].to(wide) / denominator
            student_nv = wide_logits(hidden[rows], weight)
            teacher_nv = wide_logits(teacher_hidden[rows], teacher_weight)
            kl_n, grad_nv = _kl_of_logits(student_nv, teacher_nv, axis)
            total += (kl_n * scale_n).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad_nv.mul_(scale_n[:, None])
                grad_hidden[rows] = add_products(grad_nv, hidden[rows], weight, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, *[None] * 6


def _kl_of_logits(s_nv: Tensor, t_nv: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Returns each token's KL, and its gradient for the student's logits; overwrites both logits.

    With s and t less their maxima, Z = Σ exp, and u = Σ exp(s) (s - t) / Z_s:
    KL = u - log Z_s + log Z_t, and the gradient is p (s - t - u). Equal logits give exact zeros.
    """
    tops_2n = torch.stack([s_nv.amax(-1), t_nv.amax(-1)])
    all_reduce_max_(tops_2n, axis)
    s_nv.sub_(tops_2n[0, :, None])
    t_nv.sub_(tops_2n[1, :, None])
    powers_nv = s_nv.exp()
    gap_nv = s_nv.sub_(t_nv)
    teacher_sum_n = t_nv.exp_().sum(-1)
    gap_sum_n = torch.mul(powers_nv, gap_nv, out=t_nv).sum(-1)
    sums_3n = torch.stack([powers_nv.sum(-1), teacher_sum_n, gap_sum_n])
    z_s, z_t, gap_sum_n = all_reduce_(sums_3n, axis).unbind(0)
    u_n = gap_sum_n / z_s
    kl_n = u_n - z_s.log() + z_t.log()
    grad_nv = powers_nv.mul_(gap_nv.sub_(u_n[:, None])).div_(z_s[:, None])
    return kl_n, grad_nv
