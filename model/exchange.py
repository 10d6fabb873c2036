"""Communication between ranks inside the layers of the model.

A rank's *local* tokens are those whose residual streams it holds; its *queries* are those whose
attention it computes, with its heads: the local tokens of all tensor ranks. On one process both are
all tokens of the microbatch, and every method is the identity. Where rows are sharded over ranks,
trainer/parallel/context.py communicates.

Letters: T tokens or queries, K head dim, C compressed entries, Z samples, E experts, X any width.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from model.config import LayerType
from model.kernels.indexer import MassFunction

EntryKind = Literal["csa", "hca", "index"]
"""What a compressor makes: entries of a CSA or HCA layer, or keys of a CSA layer's indexer."""


def layer_type_of(entries: EntryKind) -> LayerType:
    """Returns the type of the layers that have these entries."""
    return "hca" if entries == "hca" else "csa"


class Exchange(Protocol):
    """Communicates per-token tensors of a microbatch between the ranks that share its rows.

    Differentiable for floating-point tensors.
    """

    def of_layer(self, layer_index: int) -> Exchange:
        """Returns the exchange of one layer, by its index as in `Block`."""

    def local_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        """Returns the local tokens' elements of a vector over all tokens of the microbatch."""

    def queries_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        """Returns the queries' elements of a vector over all tokens of the microbatch."""

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        """All-gathers local rows over the tensor ranks: [local T, X] to [queries T, X]."""

    def local_of_queries(self, query_TX: Tensor) -> Tensor:
        """Slices the local tokens' rows out of rows for all queries; backward all-gathers."""

    def reduce_scatter_queries(self, partial_TX: Tensor) -> Tensor:
        """Reduce-scatters the queries' partial results to the local tokens, summed over ranks."""

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        """Gathers the keys in the queries' windows, in the order that query ranges index."""

    def prepend_halo(
        self, entries: EntryKind, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prepends the halo of a compressor's inputs: earlier tokens of its windows."""

    def gather_entries(self, entries: EntryKind, pooled_CK: Tensor) -> Tensor:
        """Gathers all entries of the microbatch, in the order of samples."""

    def attended_entries(
        self, gathered_CK: Tensor, entries: EntryKind, selected_Tk: Tensor | None
    ) -> Tensor:
        """Returns entries for attention; `gathered_CK` is what `gather_entries` returned.

        `selected_Tk` are those that the queries select, None: all that they see. Others need have
        no values.
        """

    def sum_mass(self, kind: LayerType, mass: MassFunction, selected_only: bool) -> MassFunction:
        """Returns a mass function of the local tokens and the heads of all tensor ranks.

        `mass` is of the queries and this rank's heads. The result may communicate when called. If
        `selected_only`, its columns are each query's selected entries; otherwise the entries of the
        microbatch.
        """

    def sum_counts(self, counts_ZE: Tensor) -> Tensor:
        """Sums counts over the ranks that hold tokens of the same samples."""


class LocalExchange:
    """The exchange of one process, which has all tokens: every method returns its argument."""

    def of_layer(self, layer_index: int) -> Exchange:
        return self

    def local_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T

    def queries_of_microbatch(self, microbatch_T: Tensor) -> Tensor:
        return microbatch_T

    def gather_queries(self, local_TX: Tensor) -> Tensor:
        return local_TX

    def local_of_queries(self, query_TX: Tensor) -> Tensor:
        return query_TX

    def reduce_scatter_queries(self, partial_TX: Tensor) -> Tensor:
        return partial_TX

    def gather_keys(self, local_TK: Tensor) -> Tensor:
        return local_TK

    def prepend_halo(
        self, entries: EntryKind, values_TX: Tensor, gates_TX: Tensor
    ) -> tuple[Tensor, Tensor]:
        return values_TX, gates_TX

    def gather_entries(self, entries: EntryKind, pooled_CK: Tensor) -> Tensor:
        return pooled_CK

    def attended_entries(
        self, gathered_CK: Tensor, entries: EntryKind, selected_Tk: Tensor | None
    ) -> Tensor:
        return gathered_CK

    def sum_mass(self, kind: LayerType, mass: MassFunction, selected_only: bool) -> MassFunction:
        return mass

    def sum_counts(self, counts_ZE: Tensor) -> Tensor:
        return counts_ZE
