"""Vocabulary sharded over tensor ranks: the embedding and the cross-entropy of the heads.

Heads, output groups and the shared expert need nothing here: a rank multiplies with its part of
their weights (placement.py says which), after `Exchange.gather_queries` has gathered the tokens and
before `Exchange.reduce_scatter_queries` reduce-scatters them, so that the residual streams between
are sharded over the tensor ranks as well (sequence parallelism, arXiv 2205.05198 §4.2.2).

Letters: T queries, v vocabulary of this rank, D hidden size, n queries of a chunk.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from model.kernels.cross_entropy import chunk_tokens
from trainer.parallel.collectives import all_reduce_, all_reduce_max_
from trainer.parallel.grid import Axis
from trainer.parallel.ring import all_reduce_bytes

with warnings.catch_warnings(action="ignore"):  # about absent NVIDIA packages
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding


class ShardedEmbedding(VocabParallelEmbedding):
    """An embedding, on the meta device, whose vocabulary is sharded over tensor ranks.

    Every rank gets the embeddings of all queries: the ranks' partial results are summed.
    """

    def __init__(self, embed: nn.Embedding, axis: Axis) -> None:
        self.axis = axis
        config = ModelParallelConfig(
            tensor_model_parallel_size=axis.size,
            params_dtype=embed.weight.dtype,
            use_cpu_initialization=True,  # allocates on torch's default device, here meta
            perform_initialization=False,
        )
        with torch.device("meta"):
            super().__init__(
                embed.num_embeddings,
                embed.embedding_dim,
                init_method=lambda weight: weight,  # V4Model.init_weights sets the values
                config=config,
                tp_group=axis.group,
            )

    def forward(self, tokens_T: Tensor) -> Tensor:
        with self.axis.waiting("all_reduce"):  # and the lookup, which takes no time
            embedded_TD = super().forward(tokens_T)
        size = all_reduce_bytes(self.axis.size, embedded_TD.nbytes)
        self.axis.traffic.add(self.axis.name, "all_reduce", size)
        return embedded_TD


class VocabCrossEntropy:
    """`linear_cross_entropy` with the head's rows sharded over tensor ranks.

    Every rank returns the same loss. The gradient of the hidden states is partial: it comes from
    this rank's shard of the vocabulary alone.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(
        self,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        target_T: Tensor,
        denominator: float,
        ignore_index: int,
    ) -> Tensor:
        """Sums the loss of the queries with a target and divides it by `denominator`, fp32."""
        needs_grad = torch.is_grad_enabled() and hidden_TD.requires_grad
        return _VocabCrossEntropy.apply(
            hidden_TD, weight_vD, target_T, denominator, ignore_index, self.axis, needs_grad
        )


class _VocabCrossEntropy(torch.autograd.Function):
    # As in model/kernels/cross_entropy, gradients are computed while a chunk's logits are in
    # memory.

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        denominator: float,
        ignore_index: int,
        axis: Axis,
        needs_grad: bool,
    ) -> Tensor:
        mcore = VocabParallelCrossEntropy
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        valid_T = target != ignore_index
        target_T = target.masked_fill(~valid_T, 0)
        first = axis.rank * weight.shape[0]
        step = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            scale_n = valid_T[rows] / denominator
            logits_nv, max_n = mcore.calculate_logits_max(torch.mm(hidden[rows], weight.t()))
            all_reduce_max_(max_n, axis)
            mask_n, index_n, picked_n, sum_n, exp_nv = mcore.calculate_predicted_logits(
                logits_nv, target_T[rows], max_n, first, first + weight.shape[0]
            )
            picked_n, sum_n = all_reduce_(torch.stack([picked_n, sum_n]), axis).unbind(0)
            softmax_nv, loss_n = mcore.calculate_cross_entropy_loss(exp_nv, picked_n, sum_n)
            total += (loss_n * scale_n).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad_2d, row_n, update, grad = mcore.prepare_gradient_calculation_operands(
                    softmax_nv, mask_n
                )
                mcore.calculate_gradients(grad_2d, row_n, index_n, update, grad, scale_n)
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[rows])
                grad_weight += torch.mm(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, *[None] * 5
