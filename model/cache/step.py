"""A model with the cache of some sequences: prefill in chunks, decode, and the MTP block's drafts.

B sequences; T new tokens of all of them; N streams; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.cache.cache import Cache
from model.config import AttentionMode, LayerType
from model.exchange import Exchange
from model.transformer import Microbatch, V4Model


class CachedModel:
    """Runs new tokens of B sequences through a model; the sequences may have unequal lengths.

    Attributes:
        cache: that of the layers.
        mtp_cache: that of the MTP block, which runs one token later; None without one.
    """

    def __init__(
        self,
        model: V4Model,
        sequences: int,
        max_tokens: int,
        packed: bool = False,
        base: Exchange | None = None,
        gather_logits: Callable[[Tensor], Tensor] = lambda logits: logits,
        attention: AttentionMode = "select",
    ) -> None:
        """Allocates the caches; `packed` and `base` as in Cache.

        `gather_logits` maps this rank's logits [T, v] to those of the whole vocabulary [T, V].
        `attention` is that of CSA layers, select or dense.
        """
        config, device = model.config, model.head.weight.device
        self.model, self._gather_logits = model, gather_logits
        self._attention = attention

        def cache_of(first: int, kinds: Sequence[LayerType]) -> Cache:
            layers = dict(enumerate(kinds, first))
            return Cache(config, layers, sequences, max_tokens, model.dtype, device, packed, base)

        self.cache = cache_of(0, config.layer_types)
        self.mtp_cache = None
        if model.mtp_block is not None:
            self.mtp_cache = cache_of(config.num_hidden_layers, ["window"])

    @torch.no_grad()
    def forward(self, tokens_T: Tensor, new: Sequence[int]) -> Tensor:
        """Returns the residual streams [T, N, D] of new tokens, `new[b]` of each sequence."""
        micro = self._microbatch(self.cache, tokens_T, new)
        model = self.model
        streams_TND, _ = model.run_blocks(model.embed_streams(micro), micro, model.layers)
        self.cache.advance(new)
        return streams_TND

    @torch.no_grad()
    def logits(self, streams_TND: Tensor) -> Tensor:
        """Returns the main head's logits [T, V]."""
        model = self.model
        return self._gather_logits(model.head(model.norm(model.hc_head(streams_TND))))

    @torch.no_grad()
    def draft_hidden(self, streams_TND: Tensor, next_T: Tensor, new: Sequence[int]) -> Tensor:
        """Runs the MTP block; returns hidden states [T, D], for `draft_logits`.

        Args:
            streams_TND: the main model's streams of tokens that the MTP block has not seen.
            next_T: the token that follows each of them.
            new: how many of them belong to each sequence.
        """
        model, block = self.model, self.model.mtp_block
        assert block is not None and self.mtp_cache is not None
        micro = self._microbatch(self.mtp_cache, next_T, new)
        hidden_TD, _ = block.predict_hidden(
            streams_TND,
            micro.exchange.local_of_queries(model.embed(next_T)),
            next_T,
            micro.positions,
            micro.exchange,
            micro.num_routed_tokens,
        )
        self.mtp_cache.advance(new)
        return hidden_TD

    @torch.no_grad()
    def draft_logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns the MTP head's logits [T, V], which predict the token after `next_T`."""
        return self._gather_logits(self.model.head(hidden_TD))

    def _microbatch(self, cache: Cache, tokens_T: Tensor, new: Sequence[int]) -> Microbatch:
        placement, exchange = cache.place(new)
        return Microbatch(
            placement.positions,
            exchange,
            placement.layout,
            tokens_T[None],
            None,
            None,
            0.0,
            {},
            self._attention,
        )
