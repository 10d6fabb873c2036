"""Communication between ranks inside the layers of the model.

A rank's *local* tokens are those whose residual streams it holds; its *queries* are those whose
attention it computes. On one process both are all tokens of the microbatch, and every method is
the identity. Where rows are sharded over ranks, trainer/parallel/context.py communicates.

Letters: T tokens or queries, K head dim, C compressed entries, S samples, E experts, X any width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from model.config import LayerType
from model.kernels.indexer import AttentionProbabilityMass


class Exchange(Protocol):
    """Moves values of a microbatch's tokens between ranks; differentiable for activations."""

    def select_local(self, microbatch_T: Tensor) -> Tensor:
        """Returns the local tokens' elements of a vector over all tokens of the microbatch."""

    def select_queries(self, microbatch_T: Tensor) -> Tensor:
        """Returns the queries' elements of a vector over all tokens of the microbatch."""

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        """Gathers the queries' values from the ranks that hold them as local tokens."""

    def slice_local(self, query_TX: Tensor) -> Tensor:
        """Returns the local tokens' rows of values that this rank has for all its queries."""

    def scatter_sum(self, partial_TX: Tensor) -> Tensor:
        """Reduce-scatters partial results of the queries (a rank's heads') to the local tokens."""

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        """Gathers the keys in the queries' windows, in the order that query ranges index."""

    def with_preceding(
        self, kind: LayerType, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prepends the halo of a compressor's inputs: earlier tokens of its windows."""

    def gather_entries(self, kind: LayerType, pooled_CK: Tensor) -> Tensor:
        """Gathers all entries of the microbatch, in the order of samples."""

    def sum_mass(
        self, kind: LayerType, mass: AttentionProbabilityMass, listed: bool
    ) -> AttentionProbabilityMass:
        """Sums attention probability mass over the heads of all ranks, for the local tokens.

        If `listed`, columns are the selected entries; otherwise the entries that a query may see.
        """

    def sum_counts(self, counts_SE: Tensor) -> Tensor:
        """Sums counts over the ranks that hold tokens of the same samples."""


class LocalExchange:
    """The exchange of one process, which has all tokens: every method returns its argument."""

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
