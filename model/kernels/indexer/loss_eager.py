"""The indexer's objective and its gradients with torch's functions, on any device.

One pass over blocks of queries computes both, so the target is evaluated once and nothing of size
[T, C] is ever stored.

T queries, n of a block; I index heads; J their width; C entries, c of a block; k selected entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.indexer.kl_target import MIN_PROBABILITY_MASS, KLTarget
from model.kernels.tensor_cores import tf32_matmuls

_CPU_SCORES, _GPU_SCORES = 1 << 19, 1 << 27
"""Max per-head scores held at once: fits a core's cache (CPU), or 0.5 GiB (GPU)."""


def eager_objective(
    inputs: IndexerInputs, target: KLTarget, weight_T: Tensor, needs_grad: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Computes Σ_t weight_t · KL_t and, if ``needs_grad``, its gradients, block by block.

    Returns:
        A 0-dim tensor, and the gradients of queries, keys and head weights, or an empty tuple.
    """
    q_TIJ = inputs.q_TIJ
    max_scores = _CPU_SCORES if q_TIJ.device.type == "cpu" else _GPU_SCORES
    compute_dtype = torch.promote_types(q_TIJ.dtype, torch.float32)
    total = torch.zeros((), dtype=compute_dtype, device=q_TIJ.device)
    gradients = _Gradients(inputs) if needs_grad else None
    for rows, columns in target.blocks(len(inputs.keys_CJ), max_scores // q_TIJ.shape[1]):
        block = _Block(inputs, target, rows, columns)
        loss_n, lse_n = block.divergence()
        total += (loss_n * weight_T[rows]).sum()
        if gradients is not None:
            with tf32_matmuls(q_TIJ):
                gradients.add(block, lse_n, weight_T[rows])
    return total, () if gradients is None else gradients.of_inputs()


class _Block:
    """Scores of a block of queries, and their target distribution."""

    def __init__(
        self, inputs: IndexerInputs, kl_target: KLTarget, rows: slice, columns: slice
    ) -> None:
        q, keys, weights = inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI
        ranges, selected = kl_target.ranges, kl_target.selected_Tk
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        self.rows, self.columns = rows, columns
        self.q, self.weights = q[rows].to(compute_dtype), weights[rows].to(compute_dtype)
        self.index = None
        if selected is None:
            assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
            index = torch.arange(columns.start, columns.stop, device=q.device)
            low, high = ranges.entry_start_T[rows, None], ranges.entry_end_T[rows, None]
            self.visible = (index >= low) & (index < high)
            self.keys = keys[columns].to(compute_dtype)
            with tf32_matmuls(q):  # exact: the factors are in bf16
                dots = (self.q.flatten(0, 1) @ self.keys.t()).view(*self.q.shape[:2], -1)
        else:
            self.visible = selected[rows] >= 0
            self.index = selected[rows].clamp(min=0).flatten()
            self.keys = (
                keys.index_select(0, self.index).to(compute_dtype).view(*self.visible.shape, -1)
            )
            with tf32_matmuls(q):
                dots = torch.bmm(self.q, self.keys.transpose(1, 2))
        self.dots = dots.relu_()
        self.scores = torch.bmm(self.weights[:, None], self.dots)[:, 0]
        mass = kl_target.mass(rows, columns).to(compute_dtype)
        mass = mass.masked_fill(~self.visible | (mass < MIN_PROBABILITY_MASS), 0.0)
        self.total = mass.sum(1)
        self.target = mass / self.total.clamp(min=MIN_PROBABILITY_MASS)[:, None]

    def divergence(self) -> tuple[Tensor, Tensor]:
        """Returns KL and log Σ exp(s), each [n]."""
        lse = self.scores.masked_fill(~self.visible, float("-inf")).logsumexp(1)
        kl_without_lse = (torch.xlogy(self.target, self.target) - self.target * self.scores).sum(1)
        return (kl_without_lse + lse).masked_fill(self.total == 0, 0.0), lse

    def gradients(self, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of queries, head weights and keys.

        Those of the keys are [c, J], or [n·k, J] for selected entries.
        """
        probability = (self.scores - lse[:, None]).exp()
        grad_scores = (probability - self.target).mul_(grad[:, None])
        grad_scores.masked_fill_(~self.visible | (self.total == 0)[:, None], 0.0)
        grad_weights = torch.bmm(self.dots, grad_scores[..., None])[..., 0]
        grad_dots = grad_scores[:, None] * self.weights[..., None] * (self.dots > 0)
        if self.index is None:
            flat = grad_dots.flatten(0, 1)
            grad_q = (flat @ self.keys).view_as(self.q)
            return grad_q, grad_weights, flat.t() @ self.q.flatten(0, 1)
        grad_keys = torch.bmm(grad_dots.transpose(1, 2), self.q)
        return torch.bmm(grad_dots, self.keys), grad_weights, grad_keys.flatten(0, 1)


class _Gradients:
    """Gradients of queries, keys and head weights, summed over all blocks."""

    def __init__(self, inputs: IndexerInputs) -> None:
        q, keys, weights = inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI
        self.q, self.weights = torch.zeros_like(q), torch.zeros_like(weights)
        self.keys = torch.zeros_like(keys, dtype=torch.promote_types(q.dtype, torch.float32))
        self.dtype = keys.dtype

    def add(self, block: _Block, lse_n: Tensor, grad_n: Tensor) -> None:
        """Adds one block's gradients; ``grad_n`` is the gradient of each query's divergence."""
        rows = block.rows
        self.q[rows], self.weights[rows], grad_keys = block.gradients(lse_n, grad_n)
        if block.index is None:
            self.keys[block.columns] += grad_keys
        else:
            self.keys.index_add_(0, block.index, grad_keys)

    def of_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients in the dtypes of the inputs."""
        return self.q, self.keys.to(self.dtype), self.weights
