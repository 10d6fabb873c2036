"""Arguments shared by the public, eager and Triton versions of the indexer.

T queries; I index heads; J their width; C compressed entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class IndexerInputs:
    """Inputs of the scores s_ts = Σ_h w_h · ReLU(q_h · k_s) of query t, entry s (report §2.3.1).

    Attributes:
        q_TIJ: rotated queries.
        keys_CJ: rotated keys of the entries.
        weights_TI: the heads' weights, with the J^-0.5 · I^-0.5 scale folded in.
    """

    q_TIJ: Tensor
    keys_CJ: Tensor
    weights_TI: Tensor
