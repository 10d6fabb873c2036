"""Experts divided over two ranks: outputs and gradients are those of one rank with all experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.dispatch import Dispatch, LocalDispatch
from model.router import Routing
from tests.distributed import spawn
from trainer.parallel.degrees import Degrees
from trainer.parallel.expert import ExpertDispatch
from trainer.parallel.grid import Grid

TOKENS, EXPERTS, ACTIVE, DIM = 11, 4, 2, 3


def inputs(rank: int, idle: bool) -> tuple[Tensor, Routing]:
    """A rank's tokens and their experts; where `idle`, the first two experts get no token."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    if idle:
        scores_TE[:, :2] = -1
    weights_TA, indices_TA = scores_TE.topk(ACTIVE)
    return x_TD, Routing(indices_TA, weights_TA, scores_TE)


def run(
    dispatch: Dispatch, factors_E: Tensor, x_TD: Tensor, routing: Routing
) -> tuple[Tensor, ...]:
    """Expert e multiplies its rows with factor e; outputs, and gradients of x and factors."""
    factors_E = factors_E.clone().requires_grad_()
    sent = dispatch.begin(x_TD, routing, EXPERTS)()
    ends_E = sent.ends_E.tolist()
    bounds = list(zip([0, *ends_E[:-1]], ends_E, strict=True))
    rows = [sent.rows_PD[a:b] * factors_E[e] for e, (a, b) in enumerate(bounds)]
    unused = sent.rows_PD[ends_E[-1] :] * 0
    y_PD = torch.cat([*rows, unused]) * sent.weights_P[:, None]
    out_TD = dispatch.combine(y_PD, sent, TOKENS)
    grads = torch.autograd.grad(out_TD.square().sum(), [x_TD, factors_E])
    return out_TD.detach(), *grads


def on_rank(rank: int, world_size: int, idle: bool) -> tuple[Tensor, ...]:
    factors_E = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)
    grid = Grid.build(Degrees(world_size, expert=2), torch.device("cpu"))
    half = EXPERTS // 2
    local_E = factors_E.split(half)[grid.expert_all_to_all.rank]
    return run(ExpertDispatch(grid), local_E, *inputs(rank, idle))


@pytest.mark.parametrize("idle", [False, True])
def test_divided_experts_compute_what_one_rank_does(idle: bool) -> None:
    factors_E = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)
    outcomes = spawn(on_rank, 2, idle)
    alone = [run(LocalDispatch(), factors_E, *inputs(rank, idle)) for rank in range(2)]
    for (out, grad_x, _), (expected, wanted_x, _) in zip(outcomes, alone, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(grad_x, wanted_x, rtol=1e-14, atol=0)
    grads_E = torch.cat([outcome[2] for outcome in outcomes])
    torch.testing.assert_close(grads_E, alone[0][2] + alone[1][2], rtol=1e-14, atol=0)
