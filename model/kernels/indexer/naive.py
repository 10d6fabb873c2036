"""Dense reference of the indexer's scores, selection (report §2.3.1) and loss (V3.2), in any dtype.

T queries; I index heads; J their width; C entries; k selected entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_scores(q_TIJ: Tensor, keys_CJ: Tensor, weights_TI: Tensor) -> Tensor:
    """Computes s_ts = Σ_h w_h · ReLU(q_h · k_s), [T, C]."""
    dots_TIC = torch.einsum("tij,cj->tic", q_TIJ, keys_CJ).relu()
    return torch.einsum("tic,ti->tc", dots_TIC, weights_TI)


def naive_select_topk(scores_TC: Tensor, sees_TC: Tensor, k: int) -> Tensor:
    """Selects the k best visible entries of each query (-1: none), [T, k].

    Ties are broken in favour of the lower index.
    """
    order_TC = scores_TC.masked_fill(~sees_TC, -torch.inf).sort(dim=1, descending=True, stable=True)
    best_Tk = order_TC.indices[:, :k]
    best_Tk = best_Tk.masked_fill(~sees_TC.gather(1, best_Tk), -1)
    return torch.nn.functional.pad(best_Tk, (0, k - best_Tk.shape[1]), value=-1)


def naive_query_divergences(
    q_TIJ: Tensor, keys_CJ: Tensor, weights_TI: Tensor, mass_TC: Tensor, sees_TC: Tensor
) -> Tensor:
    """Computes KL(p_t ‖ softmax(s_t)) over the visible entries, p = mass / Σ mass, [T].

    A query whose entries got no mass contributes 0.
    """
    scores_TC = naive_scores(q_TIJ, keys_CJ, weights_TI)
    mass_TC = mass_TC * sees_TC
    has_mass_T = mass_TC.sum(1) > 0
    target = mass_TC[has_mass_T] / mass_TC[has_mass_T].sum(1, keepdim=True)
    log_probability = scores_TC.masked_fill(~sees_TC, -torch.inf)[has_mass_T].log_softmax(1)
    log_probability = log_probability.masked_fill(~sees_TC[has_mass_T], 0.0)
    kl = (torch.xlogy(target, target) - target * log_probability).sum(1)
    return torch.zeros(len(q_TIJ), dtype=kl.dtype, device=kl.device).masked_scatter(has_mass_T, kl)
