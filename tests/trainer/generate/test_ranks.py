"""Texts of models that tensor and expert ranks share, compared with those of one rank."""

from __future__ import annotations

import pytest
import torch

from model import V4Model
from model.cache import CachedModel
from tests.distributed import spawn
from tests.model.tiny import relative_error, tiny_config
from trainer.generate import Generation, Request, Sampling
from trainer.generate.ranks import Ranks
from trainer.parallel.grid import Degrees, Grid
from trainer.parallel.plan import build_local_model
from trainer.parallel.stage_plan import StagePlan

PROMPTS = [[5, 9, 20, 31], [7], list(range(3, 60))]
CONFIG = tiny_config(vocab_size=96, o_groups=4)


def request(speculative: bool) -> Request:
    return Request(PROMPTS, 24, Sampling(temperature=0), speculative=speculative)


def texts(model: V4Model, request: Request, ranks: Ranks) -> list[tuple[int, int]]:
    return list(Generation(model, request, ranks))


def logits(model: V4Model, ranks: Ranks) -> torch.Tensor:
    """Logits of all positions of a sequence that passes in two chunks, and of drafts of them."""
    tokens = torch.arange(3, 83)
    cached = CachedModel(model, 1, 100, False, ranks.exchange, ranks.gather_logits)
    parts = []
    for chunk, following in ((tokens[:50], tokens[1:51]), (tokens[50:], tokens[51:])):
        streams = cached.forward(chunk, [len(chunk)])
        parts.append(cached.logits(streams))
        hidden = cached.draft_hidden(streams[: len(following)], following, [len(following)])
        parts.append(cached.draft_logits(hidden))
    return torch.cat(parts)


def on_rank(
    rank: int, world_size: int, degrees: Degrees
) -> tuple[list[list[tuple[int, int]]], torch.Tensor]:
    grid = Grid.build(degrees, torch.device("cpu"))
    stages = StagePlan("1f1b", (CONFIG.num_hidden_layers,), 1)
    local = build_local_model(CONFIG, torch.float32, grid, stages)
    local.model.to_empty(device="cpu")
    local.model.init_weights(0, None, local.placements)
    ranks = Ranks(grid)
    found = [texts(local.model, request(speculative), ranks) for speculative in (False, True)]
    return found, logits(local.model, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [Degrees(2, tensor=2, expert_tensor=2), Degrees(2, expert=2), Degrees(2, tensor=2, expert=2)],
    ids=["tensor", "expert", "tensor with whole experts"],
)
def test_ranks_write_the_text_of_one(degrees: Degrees) -> None:
    model = V4Model(CONFIG)
    model.init_weights(0)
    expected = [texts(model, request(speculative), Ranks()) for speculative in (False, True)]
    expected_logits = logits(model, Ranks())
    for found, found_logits in spawn(on_rank, 2, degrees):
        assert found == expected
        assert relative_error(found_logits, expected_logits) < 1e-5
