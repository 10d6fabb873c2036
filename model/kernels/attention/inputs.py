"""Arguments shared by the public, eager and Triton versions of core attention.

T queries; L keys; H heads; K their width; C compressed entries; R rotary dims; r = R/2
complex numbers of a rotation; k selected entries of a query.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from model.kernels.attention.ranges import AttentionRanges


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of V4's multi-query attention.

    Attributes:
        q_THK: queries before their norm and rotation.
        kv_LK: keys (= values), normed and rotated, of the queries' tokens and of the halo before
            them, if any.
        entries_CK: compressed entries, normed and rotated.
        sink_H: logit of each head's sink, which takes probability and has no value.
        rotation_Tr: complex, the rotation at each query's position.
        ranges: the visible range of tokens and of entries for each query.
        selected_Tk: the entries selected for each query, in any order, then -1; None if a query
            sees its whole range. A query that sees at most k entries must have all of them
            selected.
        window: W, the maximum number of tokens that a query sees.
        norm_eps: of the queries' RMS norm.
    """

    q_THK: Tensor
    kv_LK: Tensor
    entries_CK: Tensor | None
    sink_H: Tensor
    rotation_Tr: Tensor
    ranges: AttentionRanges
    selected_Tk: Tensor | None = None
    window: int = field(kw_only=True)
    norm_eps: float = field(kw_only=True)

    def detached(self) -> AttentionInputs:
        """Returns the same numbers without a gradient."""
        entries_CK = None if self.entries_CK is None else self.entries_CK.detach()
        return replace(
            self,
            q_THK=self.q_THK.detach(),
            kv_LK=self.kv_LK.detach(),
            entries_CK=entries_CK,
            sink_H=self.sink_H.detach(),
        )

    def select(self, rows: slice | Tensor, columns: slice) -> AttentionInputs:
        """Restricts to some queries and, if entries are selected, to some of their k columns.

        The result has no segments and is valid for entries only.
        """
        selected_Tk = None if self.selected_Tk is None else self.selected_Tk[rows, columns]
        return replace(
            self,
            q_THK=self.q_THK[rows],
            rotation_Tr=self.rotation_Tr[rows],
            ranges=self.ranges.select(rows),
            selected_Tk=selected_Tk,
        )
