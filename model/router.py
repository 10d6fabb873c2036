"""Which experts a token goes to, with what weight, and how evenly (report §2.1, V3 §2.1.2).

Letters: L layers, T tokens, D hidden size, E experts, A experts of a token, V vocabulary,
Z samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.router import route, sample_sums
from model.layout import SampleLayout
from model.linear import fp32_linear

_MIN_COUNT = 0.01
"""Of the mean count, what a token counts at least in `balanced_table`."""


@dataclass(frozen=True)
class Routing:
    """A distinct experts for each token, their weights, and the scores of all experts."""

    indices_TA: Tensor
    weights_TA: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Scores sqrt(softplus(gate·x)) in fp32, and selects experts by score or from a table.

    A learned layer takes the A experts with the largest score plus ``bias``, a buffer that the
    trainer updates to balance load (auxiliary-loss-free load balancing, V3 §2.1.2) and that affects
    only the selection. A hash layer takes the token id's row of ``tid2eid``. Weights are the
    selected scores, normalised, times the scale.
    """

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, hashed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.hashed = hashed
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        weight = torch.empty(self.num_experts, config.hidden_size, dtype=dtype)
        self.weight = nn.Parameter(weight)
        if hashed:
            table = torch.zeros(config.vocab_size, self.top_k, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, tokens_T: Tensor, expert_indices_TA: Tensor | None = None
    ) -> Routing:
        """Routes tokens with hidden states ``x_TD`` and ids ``tokens_T``.

        ``expert_indices_TA``: precomputed expert indices (anticipatory routing, report §4.2.3), of
        any integer dtype; scores and weights still come from the current gate.
        """
        logits = fp32_linear(x_TD, self.weight)
        indices = None if expert_indices_TA is None else expert_indices_TA.long()
        if indices is None and self.hashed:
            indices = self.tid2eid[tokens_T]
        bias = None if self.hashed else self.bias
        scores, indices, weights = route(logits, bias, indices, self.top_k, self.scale)
        return Routing(indices, weights, scores)


@torch.no_grad()
def expert_loads(indices: Sequence[Tensor], layout: SampleLayout, num_experts: int) -> Tensor:
    """Returns how many non-padding tokens went to each expert of each layer, fp32 [L, E].

    `indices` are each layer's expert indices [T, A]; all layers are counted in few launches.
    """
    layers, top_k = len(indices), indices[0].shape[1]
    first_L11 = torch.arange(0, layers * num_experts, num_experts, device=indices[0].device)
    slots_LTA = torch.stack(list(indices)) + first_L11[:, None, None]
    valid = layout.derived(
        ("valid pairs", layers, top_k),
        lambda: layout.valid_T.repeat_interleave(top_k).repeat(layers),
    )
    loads = layout.valid_T.new_zeros(layers * num_experts)
    return loads.index_add_(0, slots_LTA.flatten(), valid).view(layers, num_experts)


@torch.no_grad()
def top1_weight_shares(weights: Sequence[Tensor], layout: SampleLayout) -> Tensor:
    """Returns the sum over non-padding tokens of largest weight / sum of weights, fp32 [L].

    `weights` are each layer's routing weights [T, A].
    """
    weights_LTA = torch.stack(list(weights))
    share_LT = weights_LTA.amax(-1) / weights_LTA.sum(-1)
    return share_LT.masked_fill(layout.padding_T, 0.0).sum(-1)


def balance_loss(
    routing: Routing,
    layout: SampleLayout,
    denominator: float,
    sum_counts: Callable[[Tensor], Tensor] = lambda counts_ZE: counts_ZE,
) -> Tensor:
    """Returns the sequence-wise balance loss of one layer without its weight (V3 eq. 17-20).

    For each sample Σ_i f_i · P_i, f_i = E / (A · T_z) · count_i, P_i the mean over its tokens of
    score_i / Σ_j score_j: 1 when balanced, E/A when all tokens go to the same experts. Samples are
    weighted by their token counts; ``denominator`` is the number of tokens in the global batch.
    Padding does not count. If samples are sharded over ranks, ``sum_counts`` all-reduces the
    counts, and the ranks' results add up to the loss.
    """
    num_experts, top_k = routing.scores_TE.shape[1], routing.indices_TA.shape[1]
    first_slot_T1 = layout.derived(
        ("slots", num_experts), lambda: layout.sample_T[:, None] * num_experts
    )
    pairs = routing.indices_TA.numel()
    ones_L = layout.derived(("ones", pairs), lambda: routing.scores_TE.new_ones(pairs))
    share_ZE, count_ZE = sample_sums(
        *(routing.scores_TE, routing.indices_TA, layout.sample_T, layout.num_samples),
        *(first_slot_T1, ones_L),
    )
    length_Z = layout.derived("lengths", layout.length_Z.float)
    count_ZE = sum_counts(count_ZE)
    products_Z = (count_ZE * share_ZE).sum(-1)
    return (products_Z / length_Z * layout.has_tokens_Z).sum() * (
        num_experts / (top_k * denominator)
    )


def balanced_table(
    generator: torch.Generator,
    vocab_size: int,
    num_experts: int,
    top_k: int,
    token_counts: Sequence[float] | None = None,
) -> Tensor:
    """Returns a hash layer's table: ``top_k`` distinct experts for every token id, loads balanced.

    Tokens, the most frequent first (in random order where counts are equal or not given), each
    take the experts with the least load so far; ties are broken at random. Loads then differ by
    at most one token when counts are equal. Rare tokens count as a hundredth of the mean, so that
    those which do not occur are spread over all experts, too. The rule is unpublished.

    Returns:
        int64 [V, A].
    """
    counts = [1.0] * vocab_size if token_counts is None else [float(c) for c in token_counts]
    if len(counts) != vocab_size:
        raise ValueError(f"token_counts has {len(counts)} entries, the vocabulary {vocab_size}")
    floor = _MIN_COUNT * sum(counts) / vocab_size
    counts = [max(count, floor) for count in counts]
    order = torch.randperm(vocab_size, generator=generator).tolist()
    order.sort(key=lambda token: -counts[token])
    ties = torch.rand(vocab_size + 1, top_k, generator=generator, dtype=torch.float64).tolist()
    start = torch.rand(num_experts, generator=generator, dtype=torch.float64).tolist()
    heap = [(0.0, tie, expert) for expert, tie in enumerate(start)]
    heapq.heapify(heap)
    table = torch.zeros(vocab_size, top_k, dtype=torch.int64)
    rows = [[0] * top_k] * vocab_size
    for token in order:
        taken = [heapq.heappop(heap) for _ in range(top_k)]
        rows[token] = [expert for _, _, expert in taken]
        for (load, _, expert), tie in zip(taken, ties[token], strict=True):
            heapq.heappush(heap, (load + counts[token], tie, expert))
    table.copy_(torch.tensor(rows))
    return table
