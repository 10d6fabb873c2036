"""Core attention with dense logits (report §2.3), for comparison in any dtype.

T queries; L keys; C entries; H heads; K their width; r complex numbers of a rotation;
k selected entries of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.norm.naive import naive_rotate


def naive_attention(
    q_THK: Tensor,
    kv_LK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_Tr: Tensor,
    sees_token_TL: Tensor,
    sees_entry_TC: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """Computes softmax(q·k / sqrt(K)) · k over tokens and entries, rotated back, [T, H, K]."""
    keys = kv_LK if entries_CK is None else torch.cat([kv_LK, entries_CK])
    probability = naive_probabilities(
        q_THK, kv_LK, entries_CK, sink_H, rotation_Tr, sees_token_TL, sees_entry_TC, norm_eps
    )
    return naive_rotate(torch.einsum("thl,lk->thk", probability, keys), rotation_Tr.conj())


def naive_probabilities(
    q_THK: Tensor,
    kv_LK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_Tr: Tensor,
    sees_token_TL: Tensor,
    sees_entry_TC: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """Computes the probabilities of tokens, then of entries, [T, H, L + C].

    They sum to 1 minus the sink's probability.

    Args:
        sees_token_TL, sees_entry_TC: bool, which keys a query may attend to.
    """
    q = q_THK / torch.sqrt(q_THK.square().mean(-1, keepdim=True) + norm_eps)
    q = naive_rotate(q, rotation_Tr)
    keys, sees = kv_LK, sees_token_TL
    if entries_CK is not None and sees_entry_TC is not None:
        keys, sees = torch.cat([kv_LK, entries_CK]), torch.cat([sees, sees_entry_TC], 1)
    logits = torch.einsum("thk,lk->thl", q, keys) * q.shape[-1] ** -0.5
    weight = logits.exp() * sees[:, None]
    return weight / (weight.sum(-1, keepdim=True) + sink_H.exp()[:, None])


def naive_selection_mask(selected_Tk: Tensor, entries: int) -> Tensor:
    """Converts selected entries [T, k] (-1: none) to a bool mask [T, C]."""
    return (selected_Tk[..., None] == torch.arange(entries, device=selected_Tk.device)).any(1)
