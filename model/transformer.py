"""The DeepSeek-V4 language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from model import hf
from model.block import Block
from model.config import ModelConfig
from model.hyper_connection import head_of_streams, register_hyper_head
from model.init import initialise
from model.kernels.cross_entropy import linear_cross_entropy
from model.layout import SampleLayout
from model.loss import IGNORE, TokenCounts, next_in_sample, second_targets
from model.moe import MoEStats
from model.mtp import MTPBlock
from model.norm import RMSNorm
from model.positions import Positions
from model.router import Router


@dataclass(frozen=True)
class ModelOutput:
    """Logits, or losses.

    Attributes:
        logits: [B, S, V]; None when targets were given.
        loss: what to differentiate: lm_loss + mtp weight · mtp_loss + balance_loss.
        lm_loss, mtp_loss, balance_loss: detached; the last is weighted and summed over the
            learned layers, so with even routing it is the weight times their number.
        expert_load: [layers (+ MTP), E], how many tokens chose each expert.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_load: Tensor | None = None


class V4Model(nn.Module):
    """Embedding, blocks over N residual streams, head of the streams, norm, output head, MTP.

    Matrices are held in ``dtype``; hyper-connections, norms, sinks and positional gate biases
    always in fp32. Build on the meta device, ``to_empty``, then ``init_weights``.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        vocab, dim = config.vocab_size, config.hidden_size
        self.embed = nn.Embedding(vocab, dim, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(config, kind, number < config.num_hash_layers, dtype)
            for number, kind in enumerate(config.layer_types)
        )
        register_hyper_head(self, config)
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.head = nn.Linear(dim, vocab, bias=False, dtype=dtype)
        self.mtp = nn.ModuleList(
            MTPBlock(config, dtype) for _ in range(config.num_nextn_predict_layers)
        )

    def init_weights(self, seed: int, token_counts: Sequence[float] | None = None) -> None:
        """Initial values as a function of (seed, name, expert); see ``model.init``."""
        initialise(self, self.config, seed, token_counts)

    def forward(
        self,
        tokens: Tensor,
        layout: SampleLayout | None = None,
        targets: Tensor | None = None,
        counts: TokenCounts | None = None,
        mtp_loss_weight: float | None = None,
    ) -> ModelOutput:
        """Logits of every position, or the losses.

        Args:
            tokens: int64 [B, S].
            layout: the samples of each row; by default a row is one sample.
            targets: int64 [B, S], the token that follows, ``IGNORE`` where none is predicted.
            counts: the global batch's token counts; by default this call's own. Losses and
                gradients of calls that share their counts add up to the global token mean.
            mtp_loss_weight: overrides the configured weight (it changes during a run).

        Raises:
            ValueError: tokens, targets and layout do not have the same shape.
        """
        layout = SampleLayout.whole_rows(tokens) if layout is None else layout
        _check_shapes(tokens, layout, targets)
        if targets is not None and counts is None:
            counts = TokenCounts.of(layout, targets)
        positions = Positions(self.config, layout)
        tokens_T = tokens.flatten()
        routed = counts.routed if counts is not None else layout.num_tokens
        streams_TND, stats = self._run_blocks(tokens_T, positions, routed)
        hidden_TD = self.norm(head_of_streams(self, self.config, streams_TND))
        if targets is None:
            return ModelOutput(logits=self.head(hidden_TD).view(*tokens.shape, -1))
        assert counts is not None
        targets_T = targets.flatten()
        lm_loss = self._cross_entropy(hidden_TD, targets_T, counts.lm)
        mtp_loss = torch.zeros_like(lm_loss)
        for block in cast(Sequence[MTPBlock], self.mtp):
            next_T = next_in_sample(layout, tokens_T, tokens_T)
            hidden_TD, seen = block.predict(
                streams_TND, self.embed(next_T), next_T, positions, counts.routed
            )
            stats.append(seen)
            mtp_loss = self._cross_entropy(hidden_TD, second_targets(layout, targets_T), counts.mtp)
        weight = self.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
        return self._losses(lm_loss, mtp_loss, weight, stats)

    def _run_blocks(
        self, tokens_T: Tensor, positions: Positions, routed: float
    ) -> tuple[Tensor, list[MoEStats]]:
        embedded_TD = self.embed(tokens_T)
        streams_TND = embedded_TD[:, None].expand(-1, self.config.hc_mult, -1).contiguous()
        stats = []
        for block in self.layers:
            streams_TND, seen = block(streams_TND, tokens_T, positions, routed)
            stats.append(seen)
        return streams_TND, stats

    def _cross_entropy(self, hidden_TD: Tensor, targets_T: Tensor, count: int) -> Tensor:
        return linear_cross_entropy(hidden_TD, self.head.weight, targets_T, max(count, 1), IGNORE)

    def _losses(
        self, lm_loss: Tensor, mtp_loss: Tensor, mtp_weight: float, stats: list[MoEStats]
    ) -> ModelOutput:
        balance = torch.zeros_like(lm_loss)
        for seen in stats:
            if seen.balance is not None:
                balance = balance + seen.balance
        balance = balance * self.config.balance_loss_weight
        return ModelOutput(
            loss=lm_loss + mtp_weight * mtp_loss + balance,
            lm_loss=lm_loss.detach(),
            mtp_loss=mtp_loss.detach(),
            balance_loss=balance.detach(),
            expert_load=torch.stack([seen.load_E for seen in stats]),
        )

    def routers(self) -> list[Router]:
        """Every layer's router, then the MTP block's: the rows of ``expert_load``."""
        blocks = cast(Sequence[Block], [*self.layers, *self.mtp])
        return [block.ffn.gate for block in blocks]

    @torch.no_grad()
    def update_router_bias(self, load: Tensor, speed: float = 0.001) -> None:
        """Move learned routers' biases towards even load: b_i += speed · sign(mean - load_i).

        Args:
            load: [layers (+ MTP), E] as in ``expert_load``, summed over the global batch.
        """
        for gate, load_E in zip(self.routers(), load, strict=True):
            if not gate.hashed:
                gate.bias += speed * torch.sign(load_E.mean() - load_E).to(gate.bias)

    def load_hf_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights with ``transformers``' in-memory names or official names into the model.

        MTP weights may be absent (``transformers`` drops them) and then stay as they are.

        Raises:
            ModelConfigError: a name is missing, unknown, or has another shape.
        """
        hf.load_state(self, state)

    def hf_state_dict(self, grads: bool = False) -> dict[str, Tensor]:
        """Weights, or with ``grads`` their gradients, under ``transformers``' in-memory names.

        Parameters without a gradient are left out of the latter; ``mtp.*`` keeps official names.
        """
        return hf.to_transformers(hf.named_tensors(self, grads))


def _check_shapes(tokens: Tensor, layout: SampleLayout, targets: Tensor | None) -> None:
    expected = (layout.rows, layout.row_length)
    if tuple(tokens.shape) != expected:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, the layout {expected}")
    if targets is not None and targets.shape != tokens.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}")
