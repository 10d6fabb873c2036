"""Which experts a token goes to, with what weight, and how evenly (report §2.1, V3 §2.1.2).

Letters: T tokens, D hidden size, E experts, A experts of a token, V vocabulary, S samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layout import SampleLayout, on_device


@dataclass(frozen=True)
class Routing:
    """A distinct experts for each token, their weights, and the scores of all experts."""

    indices_TA: Tensor
    weights_TA: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Scores sqrt(softplus(gate·x)) in fp32; the choice comes from the scores or from a table.

    A learned layer takes the A experts with the largest score plus ``bias``, a buffer that the
    trainer moves against the load and that affects only the choice. A hash layer takes the
    token id's row of ``tid2eid``. Weights are the chosen scores, normalised, times the scale.
    """

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, hashed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.hashed = hashed
        self.experts, self.active = config.n_routed_experts, config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        weight = torch.empty(self.experts, config.hidden_size, dtype=dtype)
        self.weight = nn.Parameter(weight)
        if hashed:
            table = torch.zeros(config.vocab_size, self.active, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(self.experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, tokens_T: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        """Routes tokens with hidden states ``x_TD`` and ids ``tokens_T``.

        ``chosen_TA``, of any integer type, is a choice that was made earlier (report §4.2.3);
        scores and weights are still those of the present gate.
        """
        logits = F.linear(x_TD.float(), self.weight.float())
        # The floor keeps the root differentiable where softplus underflows to zero.
        scores = F.softplus(logits).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        if chosen_TA is not None:
            indices = chosen_TA.long()
        elif self.hashed:
            indices = self.tid2eid[tokens_T]
        else:
            indices = (scores.detach() + self.bias).topk(self.active, dim=-1).indices
        chosen = scores.gather(1, indices)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * self.scale
        return Routing(indices, weights, scores)


def expert_load(routing: Routing, layout: SampleLayout) -> Tensor:
    """Returns how many real tokens chose each expert, fp32 [E]."""
    real = (~layout.padding_T).to(torch.float32)[:, None].expand_as(routing.indices_TA)
    load = torch.zeros_like(routing.scores_TE[0], requires_grad=False)
    return load.index_add_(0, routing.indices_TA.flatten(), real.flatten())


@torch.no_grad()
def first_share(routing: Routing, layout: SampleLayout) -> Tensor:
    """Returns the sum over real tokens of the largest weight's share of all weights, fp32."""
    weights_TA = routing.weights_TA.detach()
    share_T = weights_TA.amax(-1) / weights_TA.sum(-1)
    return share_T.masked_fill(layout.padding_T, 0.0).sum()


def balance_loss(
    routing: Routing,
    layout: SampleLayout,
    denominator: float,
    sum_counts: Callable[[Tensor], Tensor] = lambda counts_SE: counts_SE,
) -> Tensor:
    """Returns the sequence-wise balance loss of one layer without its weight (V3 eq. 17-20).

    For each sample Σ_i f_i · P_i, f_i = E / (A · T_s) · count_i, P_i the mean over its tokens of
    score_i / Σ_j score_j: 1 when balanced, E/A when all tokens choose the same experts. Samples
    are weighted by their tokens, of ``denominator`` in the global batch; padding does not count.
    If samples are divided over ranks, ``sum_counts`` sums the counts over them, and the ranks'
    results add up to the loss.
    """
    experts, active = routing.scores_TE.shape[1], routing.indices_TA.shape[1]
    scores = routing.scores_TE
    share_TE = scores / scores.sum(-1, keepdim=True)
    share_SE = share_TE.new_zeros(layout.num_samples, experts).index_add(
        0, layout.sample_T, share_TE
    )
    slot_TA = layout.sample_T[:, None] * experts + routing.indices_TA
    count_SE = torch.zeros_like(share_SE, requires_grad=False).flatten()
    count_SE.index_add_(0, slot_TA.flatten(), count_SE.new_ones(slot_TA.numel()))
    length_S = on_device(layout.sample_lengths, share_SE.device).to(share_SE.dtype)
    real_T = (~layout.padding_T).to(length_S.dtype)
    real_S = torch.zeros_like(length_S).index_add_(0, layout.sample_T, real_T).clamp_(max=1)
    count_SE = sum_counts(count_SE.view_as(share_SE))
    products_S = (count_SE * share_SE).sum(-1)
    return (products_S / length_S * real_S).sum() * (experts / (active * denominator))


def balanced_table(
    generator: torch.Generator,
    vocab_size: int,
    experts: int,
    active: int,
    token_counts: Sequence[float] | None = None,
) -> Tensor:
    """A hash layer's table: ``active`` distinct experts for every token id, loads balanced.

    Tokens, the most frequent first (in random order where counts are equal or not given), each
    take the experts with the least load so far; ties fall at random. Loads then differ by at most
    one token when counts are equal. The rule is unpublished.

    Returns:
        int64 [V, A].
    """
    counts = [1.0] * vocab_size if token_counts is None else [float(c) for c in token_counts]
    if len(counts) != vocab_size:
        raise ValueError(f"token_counts has {len(counts)} entries, the vocabulary {vocab_size}")
    order = torch.randperm(vocab_size, generator=generator).tolist()
    order.sort(key=lambda token: -counts[token])
    ties = torch.rand(vocab_size + 1, active, generator=generator, dtype=torch.float64).tolist()
    start = torch.rand(experts, generator=generator, dtype=torch.float64).tolist()
    heap = [(0.0, tie, expert) for expert, tie in enumerate(start)]
    heapq.heapify(heap)
    table = torch.zeros(vocab_size, active, dtype=torch.int64)
    rows = [[0] * active] * vocab_size
    for token in order:
        taken = [heapq.heappop(heap) for _ in range(active)]
        rows[token] = [expert for _, _, expert in taken]
        for (load, _, expert), tie in zip(taken, ties[token], strict=True):
            heapq.heappush(heap, (load + counts[token], tie, expert))
    table.copy_(torch.tensor(rows))
    return table
