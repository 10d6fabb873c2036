"""The DeepSeek-V4 language model (report §2).

Letters: B rows, S tokens of a row, T local tokens (B·S on one process), N streams, D hidden size,
V vocabulary, E experts, A experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from model import hf
from model.attention import Attention
from model.block import Block, BlockStats
from model.config import AttentionMode, ModelConfig
from model.exchange import Exchange
from model.execution import LOCAL, Execution, Objective
from model.hyper_connection import HyperConnectionHead
from model.init import Shard, initialise
from model.layout import SampleLayout
from model.mtp import MTPBlock
from model.norm import RMSNorm
from model.positions import Positions
from model.router import Router, expert_loads
from model.targets import IGNORE_INDEX, TokenCounts, mtp_targets, next_in_sample


@dataclass(frozen=True)
class ModelOutput:
    """Logits, or losses.

    Attributes:
        logits: [B, S, V]; None when targets were given.
        loss: what to differentiate: lm_loss + mtp weight · mtp_loss + balance_loss + indexer_loss.
        lm_loss, mtp_loss: detached.
        balance_loss: detached, weighted, summed over learned routers; with even load it is the
            weight times the number of learned routers.
        indexer_loss: detached; summed over the CSA layers, 0 in modes without one.
        expert_load: [layers (+ MTP), E], tokens routed to each expert.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    indexer_loss: Tensor | None = None
    expert_load: Tensor | None = None


class Microbatch:
    """A microbatch as the parts of the model use it.

    Attributes:
        positions, exchange: where this rank's tokens are, and how it reaches the others.
        tokens_T, next_T: ids of the local tokens, and of those that follow them in their sample.
        counts, mtp_loss_weight: denominators of the losses, and the weight of the MTP loss.
        experts: precomputed expert indices [T, A] by layer index (anticipatory routing); other
            layers route normally.
        attention: mode of CSA layers, see AttentionMode.
        objective: the main head's loss; None is cross-entropy.
    """

    def __init__(
        self,
        positions: Positions,
        exchange: Exchange,
        layout: SampleLayout,
        tokens_BS: Tensor,
        targets_BS: Tensor | None,
        counts: TokenCounts | None,
        mtp_loss_weight: float,
        experts: Mapping[int, Tensor],
        attention: AttentionMode,
        signals_BS: Mapping[str, Tensor] | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.positions, self.exchange = positions, exchange
        self.layout, self.experts = layout, experts
        self.attention = attention
        self.counts, self.mtp_loss_weight = counts, mtp_loss_weight
        self._tokens_T = tokens_BS.flatten()
        self._next_T = next_in_sample(layout, self._tokens_T, self._tokens_T)
        self._targets_T = None if targets_BS is None else targets_BS.flatten()
        self._signals_BS, self.objective = signals_BS or {}, objective
        self.tokens_T = exchange.local_of_microbatch(self._tokens_T)
        self.next_T = exchange.local_of_microbatch(self._next_T)

    @property
    def num_routed_tokens(self) -> float:
        """Denominator of the balance loss and the indexers' objective: non-padding tokens.

        Without counts, where no loss is returned, all tokens of the microbatch.
        """
        return self.counts.routed if self.counts is not None else self.layout.num_tokens

    @property
    def query_tokens_T(self) -> Tensor:
        """Token ids of this rank's queries."""
        return self.exchange.queries_of_microbatch(self._tokens_T)

    @property
    def query_next_T(self) -> Tensor:
        """Ids of the tokens that follow this rank's queries, for the MTP block."""
        return self.exchange.queries_of_microbatch(self._next_T)

    @property
    def query_targets_T(self) -> Tensor:
        """Targets of the main head for this rank's queries."""
        assert self._targets_T is not None
        return self.exchange.queries_of_microbatch(self._targets_T)

    @property
    def query_signals(self) -> dict[str, Tensor]:
        """The objective's further values of this rank's queries by name, [T] or [T, X]."""
        pick = self.exchange.queries_of_microbatch
        return {name: pick(values.flatten(0, 1)) for name, values in self._signals_BS.items()}

    @property
    def query_mtp_targets_T(self) -> Tensor:
        """Targets of the MTP head for this rank's queries."""
        assert self._targets_T is not None
        return self.exchange.queries_of_microbatch(mtp_targets(self.layout, self._targets_T))


class V4Model(nn.Module):
    """Embedding, blocks over N residual streams, hyper-connection head, norm, output head, MTP.

    Matrices are held in ``dtype``; hyper-connections, norms, sinks and positional gate biases
    always in fp32. Build on the meta device, ``to_empty``, then ``init_weights``. ``dtype`` is also
    the residual streams', on every pipeline stage.

    ``forward`` is ``embed_streams``, ``run_blocks`` and ``losses`` one after another; a pipeline
    calls them on different ranks. trainer/parallel/plan.py reduces a model to one rank's part.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        execution: Execution = LOCAL,
    ) -> None:
        super().__init__()
        self.config, self.execution, self.dtype = config, execution, dtype
        vocab, dim = config.vocab_size, config.hidden_size
        self.hc_head = HyperConnectionHead(config, execution.kernels)
        self.embed = nn.Embedding(vocab, dim, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(config, index, kind, index < config.num_hash_layers, dtype, execution)
            for index, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(dim, config.rms_norm_eps, execution.kernels)
        self.head = nn.Linear(dim, vocab, bias=False, dtype=dtype)
        self.mtp = nn.ModuleList(
            MTPBlock(config, config.num_hidden_layers + number, dtype, execution)
            for number in range(config.num_nextn_predict_layers)
        )

    def init_weights(
        self,
        seed: int,
        token_counts: Sequence[float] | None = None,
        shards: Mapping[str, Shard] | None = None,
    ) -> None:
        """Sets initial values, a function of (seed, name, expert); see ``model.init``."""
        initialise(self, self.config, seed, token_counts, shards or {})

    def forward(
        self,
        tokens: Tensor,
        layout: SampleLayout | None = None,
        targets: Tensor | None = None,
        counts: TokenCounts | None = None,
        mtp_loss_weight: float | None = None,
        attention: AttentionMode = "select",
    ) -> ModelOutput:
        """Returns the logits of every position, or the losses.

        Args:
            tokens: int64 [B, S].
            layout: the samples of each row; by default a row is one sample.
            targets: int64 [B, S], the token that follows, ``IGNORE_INDEX`` where none is predicted.
            counts: the global batch's token counts; by default this call's own. Losses and
                gradients of calls that share their counts add up to the global token mean.
            mtp_loss_weight: overrides the configured weight (it changes during a run).
            attention: mode of CSA layers; "warmup" and "sparse" add the indexers' objective.

        Raises:
            ValueError: tokens, targets and layout do not have the same shape.
        """
        micro = self.microbatch(
            tokens, layout, targets, counts, mtp_loss_weight, attention=attention
        )
        streams_TND, stats = self.run_blocks(self.embed_streams(micro), micro, self.layers)
        if targets is None:
            hidden_TD = self.norm(self.hc_head(streams_TND))
            return ModelOutput(logits=self.head(hidden_TD).view(*tokens.shape, -1))
        lm_loss, mtp_loss, mtp_stats = self.losses(streams_TND, micro)
        return self._output(lm_loss, mtp_loss, micro, stats + mtp_stats)

    def microbatch(
        self,
        tokens: Tensor,
        layout: SampleLayout | None = None,
        targets: Tensor | None = None,
        counts: TokenCounts | None = None,
        mtp_loss_weight: float | None = None,
        experts: Mapping[int, Tensor] | None = None,
        attention: AttentionMode = "select",
        signals: Mapping[str, Tensor] | None = None,
        objective: Objective | None = None,
    ) -> Microbatch:
        """Checks the arguments of ``forward`` and places them for the model's parts.

        ``experts``, ``attention`` and ``objective`` as in Microbatch; ``signals`` are what the
        objective needs to know of every position, [B, S] or [B, S, X] by name.
        """
        layout = SampleLayout.whole_rows(tokens) if layout is None else layout
        _check_shapes(tokens, layout, targets)
        if targets is not None and counts is None:
            counts = TokenCounts.of(layout, targets)
        weight = self.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
        positions, exchange = self.execution.place_tokens(self.config, layout)
        return Microbatch(
            positions,
            exchange,
            layout,
            tokens,
            targets,
            counts,
            weight,
            experts or {},
            attention,
            signals,
            objective,
        )

    def embed_streams(self, micro: Microbatch) -> Tensor:
        """Returns the local tokens' embeddings, copied to the streams, [T, N, D]."""
        embedded_TD = micro.exchange.local_of_queries(self.embed(micro.query_tokens_T))
        return embedded_TD[:, None].expand(-1, self.config.hc_mult, -1).contiguous()

    def run_blocks(
        self, streams_TND: Tensor, micro: Microbatch, blocks: Iterable[nn.Module]
    ) -> tuple[Tensor, list[BlockStats]]:
        """Runs some blocks; returns the streams, and each block's statistics and losses."""
        stats = []
        for block in cast(Iterable[Block], blocks):
            expert_indices_TA = micro.experts.get(block.layer_index)
            streams_TND, block_stats = block(
                streams_TND,
                micro.tokens_T,
                micro.positions,
                micro.exchange,
                micro.num_routed_tokens,
                expert_indices_TA,
                micro.attention,
            )
            stats.append(block_stats)
        return streams_TND, stats

    def losses(
        self, streams_TND: Tensor, micro: Microbatch
    ) -> tuple[Tensor, Tensor, list[BlockStats]]:
        """Returns the main head's loss, the MTP head's (unweighted), and the MTP block's stats."""
        assert micro.counts is not None
        hidden_TD = self.norm(self.hc_head(streams_TND))
        if micro.objective is None:
            lm_loss = self._cross_entropy(micro, hidden_TD, micro.query_targets_T, micro.counts.lm)
        else:
            lm_loss = micro.objective(
                micro.exchange.gather_queries(hidden_TD),
                self.head.weight,
                micro.query_targets_T,
                micro.query_signals,
                max(micro.counts.lm, 1),
            )
        block = self.mtp_block
        if block is None:
            return lm_loss, torch.zeros_like(lm_loss), []
        hidden_TD, stats = block.predict_hidden(
            streams_TND,
            micro.exchange.local_of_queries(self.embed(micro.query_next_T)),
            micro.next_T,
            micro.positions,
            micro.exchange,
            micro.num_routed_tokens,
            micro.experts.get(block.layer_index),
        )
        targets_T = micro.query_mtp_targets_T
        mtp_loss = self._cross_entropy(micro, hidden_TD, targets_T, micro.counts.mtp)
        return lm_loss, mtp_loss, [stats]

    @property
    def mtp_block(self) -> MTPBlock | None:
        """The multi-token prediction block; None in models and pipeline stages without one."""
        return cast(MTPBlock, self.mtp[0]) if len(self.mtp) else None

    def select_mtp_experts(self, streams_TND: Tensor, micro: Microbatch) -> list[Tensor]:
        """Returns the expert indices that the MTP block's router selects, [T, A]; or no tensor."""
        if self.mtp_block is None:
            return []
        return [
            self.mtp_block.select_mtp_experts(
                streams_TND,
                micro.exchange.local_of_queries(self.embed(micro.query_next_T)),
                micro.next_T,
                micro.positions,
                micro.exchange,
            )
        ]

    def _cross_entropy(
        self, micro: Microbatch, hidden_TD: Tensor, targets_T: Tensor, count: int
    ) -> Tensor:
        hidden_TD = micro.exchange.gather_queries(hidden_TD)
        cross_entropy = self.execution.cross_entropy
        return cross_entropy(hidden_TD, self.head.weight, targets_T, max(count, 1), IGNORE_INDEX)

    def weighted_balance(self, stats: Iterable[BlockStats]) -> Tensor | None:
        """Returns several layers' balance loss with its weight; None where no layer has one."""
        terms = [block.balance for block in stats if block.balance is not None]
        return sum(terms[1:], terms[0]) * self.config.balance_loss_weight if terms else None

    @staticmethod
    def indexer_loss(stats: Iterable[BlockStats]) -> Tensor | None:
        """Returns the sum of the layers' indexer objectives; None where there are none."""
        terms = [block.indexer for block in stats if block.indexer is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def _output(
        self, lm_loss: Tensor, mtp_loss: Tensor, micro: Microbatch, stats: list[BlockStats]
    ) -> ModelOutput:
        balance = self.weighted_balance(stats)
        balance = torch.zeros_like(lm_loss) if balance is None else balance
        indexer = self.indexer_loss(stats)
        indexer = torch.zeros_like(lm_loss) if indexer is None else indexer
        return ModelOutput(
            loss=lm_loss + micro.mtp_loss_weight * mtp_loss + balance + indexer,
            lm_loss=lm_loss.detach(),
            mtp_loss=mtp_loss.detach(),
            balance_loss=balance.detach(),
            indexer_loss=indexer.detach(),
            expert_load=expert_loads(
                [block.expert_indices_TA for block in stats],
                micro.positions.layout,
                self.config.n_routed_experts,
            ),
        )

    def routers(self) -> dict[int, Router]:
        """Routers by layer index (= row of ``expert_load``); the MTP block comes last."""
        return {index: block.ffn.gate for index, block in self._blocks()}

    def attentions(self) -> dict[int, Attention]:
        """Attention modules by layer index; the MTP block comes last."""
        return {index: block.attn for index, block in self._blocks()}

    def _blocks(self) -> list[tuple[int, Block]]:
        """The blocks of this rank by layer index; other pipeline stages' are placeholders."""
        blocks = enumerate([*self.layers, *self.mtp])
        return [(index, block) for index, block in blocks if isinstance(block, Block)]

    @torch.no_grad()
    def update_router_bias(self, load: Tensor, speed: float = 0.001) -> None:
        """Moves learned routers' biases towards even load: b_i += speed · sign(mean - load_i).

        Args:
            load: [layers (+ MTP), E] as in ``expert_load``, summed over the global batch.
        """
        num_blocks = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        if len(load) != num_blocks:
            raise ValueError(f"load has {len(load)} rows but the model has {num_blocks} routers")
        learned = {index: gate for index, gate in self.routers().items() if not gate.hashed}
        if learned:  # all at once: few launches
            steps_LE = speed * torch.sign(load.mean(1, keepdim=True) - load).float()
            biases = [gate.bias for gate in learned.values()]
            torch._foreach_add_(biases, [steps_LE[index] for index in learned])

    def load_hf_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies weights with ``transformers``' in-memory names or official names into the model.

        MTP weights may be absent (``transformers`` drops them); then the model's own are kept.

        Raises:
            ModelConfigError: a name is missing, unknown, or has another shape.
        """
        hf.load_state(self, state)

    def hf_state_dict(self, grads: bool = False) -> dict[str, Tensor]:
        """Weights, or with ``grads`` their gradients, under ``transformers``' in-memory names.

        Parameters without a gradient are then omitted; ``mtp.*`` keeps official names.
        """
        return hf.to_transformers(hf.named_tensors(self, grads))


def _check_shapes(tokens: Tensor, layout: SampleLayout, targets: Tensor | None) -> None:
    expected = (layout.rows, layout.seq_len)
    if tuple(tokens.shape) != expected:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, the layout {expected}")
    if targets is not None and targets.shape != tokens.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}")
