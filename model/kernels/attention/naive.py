"""Core attention with whole matrices (report §2.3.1-2.3.3), for comparison in any dtype.

T queries; S tokens; C entries; H heads; K their width; R rotated dims; k selected entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.norm.naive import naive_rotate


def naive_attention(
    q_THK: Tensor,
    kv_SK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_TR: Tensor,
    sees_token_TS: Tensor,
    sees_entry_TC: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """Computes softmax(q·k / sqrt(K)) · k over tokens and entries, rotated back, [T, H, K]."""
    keys = kv_SK if entries_CK is None else torch.cat([kv_SK, entries_CK])
    probability = naive_probabilities(
        q_THK, kv_SK, entries_CK, sink_H, rotation_TR, sees_token_TS, sees_entry_TC, norm_eps
    )
    return naive_rotate(torch.einsum("ths,sk->thk", probability, keys), rotation_TR.conj())


def naive_probabilities(
    q_THK: Tensor,
    kv_SK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_TR: Tensor,
    sees_token_TS: Tensor,
    sees_entry_TC: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """Computes the probabilities of tokens, then of entries, [T, H, S + C]; the sink has the rest.

    Args:
        sees_token_TS, sees_entry_TC: bool, which keys a query may attend to.
    """
    q = q_THK / torch.sqrt(q_THK.square().mean(-1, keepdim=True) + norm_eps)
    q = naive_rotate(q, rotation_TR)
    keys, sees = kv_SK, sees_token_TS
    if entries_CK is not None and sees_entry_TC is not None:
        keys, sees = torch.cat([kv_SK, entries_CK]), torch.cat([sees, sees_entry_TC], 1)
    logits = torch.einsum("thk,sk->ths", q, keys) * q.shape[-1] ** -0.5
    weight = logits.exp() * sees[:, None]
    return weight / (weight.sum(-1, keepdim=True) + sink_H.exp()[:, None])


def naive_selection_mask(selected_Tk: Tensor, entries: int) -> Tensor:
    """Writes lists of entries (-1: none) as a mask, bool [T, C]."""
    return (selected_Tk[..., None] == torch.arange(entries, device=selected_Tk.device)).any(1)
