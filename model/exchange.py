"""How a rank reaches the tokens of other ranks inside the layers of the model.

A rank's *local* tokens are those whose residual streams it holds, its *queries* those whose
attention it computes. On one process both are all tokens of the microbatch, and no method has
anything to do. Where rows are divided over ranks, trainer/parallel/context.py communicates.

Letters: T tokens or queries, K head dim, C compressed entries, S samples, E experts, X any width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from model.config import LayerType
from model.kernels.indexer import AttentionProbabilityMass


class Exchange(Protocol):
    """Moves values of a microbatch's tokens between ranks. Those of activations differentiate."""

    def select_local(self, microbatch_T: Tensor) -> Tensor:
        """The local tokens' part of a vector over all tokens of the microbatch."""

    def select_queries(self, microbatch_T: Tensor) -> Tensor:
        """The queries' part of a vector over all tokens of the microbatch."""

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        """Gathers the queries' values from the ranks that hold them as local tokens."""

    def slice_local(self, query_TX: Tensor) -> Tensor:
        """The local tokens' part of values that are complete at every query."""

    def scatter_sum(self, partial_TX: Tensor) -> Tensor:
        """Sums partial results of the queries over heads; each rank gets its local tokens'."""

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        """Gathers all that the queries' windows may reach, in the order of the query ranges."""

    def with_preceding(
        self, kind: LayerType, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A compressor's inputs of the local tokens and of those before them in its windows."""

    def gather_entries(self, kind: LayerType, pooled_CK: Tensor) -> Tensor:
        """Gathers the microbatch's entries, sample after sample, from the ranks that pool them."""

    def sum_mass(
        self, kind: LayerType, mass: AttentionProbabilityMass, listed: bool
    ) -> AttentionProbabilityMass:
        """Sums the attention of queries over all heads, from those of each rank, by local token.

        Where the selected entries are not `listed`, columns are the entries that a query may see.
        """

    def sum_counts(self, counts_SE: Tensor) -> Tensor:
        """Sums counts by sample over the ranks that hold tokens of the same samples."""


class LocalExchange:
    """All tokens are on this process: every method returns its argument."""

    def select_local(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T

    def select_queries(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        return local_TX

    def slice_local(self, query_TX: Tensor) -> Tensor:
        return query_TX

    def scatter_sum(self, partial_TX: Tensor) -> Tensor:
        return partial_TX

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        return local_TK

    def with_preceding(
        self, kind: LayerType, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        return values_TX, gates_TX

    def gather_entries(self, kind: LayerType, pooled_CK: Tensor) -> Tensor:
        return pooled_CK

    def sum_mass(
        self, kind: LayerType, mass: AttentionProbabilityMass, listed: bool
    ) -> AttentionProbabilityMass:
        return mass

    def sum_counts(self, counts_SE: Tensor) -> Tensor:
        return counts_SE
