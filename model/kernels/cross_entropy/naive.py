"""Cross-entropy of a linear head on dense logits, for comparison in any dtype.

T tokens; D the hidden width; V the vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def naive_linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, denominator: float, ignore_index: int
) -> Tensor:
    """Computes Σ_t -log softmax(W h_t)[target_t] / denominator over the tokens with a target."""
    return naive_softmax_loss(hidden_TD @ weight_VD.t(), target_T, ignore_index).sum() / denominator


def naive_softmax_loss(logits_TV: Tensor, target_T: Tensor, ignore_index: int) -> Tensor:
    """Computes -log softmax(logits_t)[target_t], [T]; 0 where the target is ``ignore_index``."""
    valid_T = target_T != ignore_index
    index_T1 = target_T.masked_fill(~valid_T, 0)[:, None]
    loss_T = -logits_TV.log_softmax(-1).gather(1, index_T1)[:, 0]
    return loss_T.masked_fill(~valid_T, 0.0)
