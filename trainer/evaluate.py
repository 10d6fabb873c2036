"""Loss on held-out rows: the token mean over the split, the same at any number of ranks."""

from dataclasses import dataclass

import torch

from data import Loader
from model import SampleLayout, TokenCounts, V4Model
from trainer.config import RunConfig
from trainer.parallel.collectives import sum_
from trainer.parallel.grid import Grid

_SUMS = TokenCounts(lm=1, mtp=1, routed=1)  # denominators of 1: the model returns plain sums
_IGNORE = -100


@dataclass(frozen=True)
class Evaluation:
    """Result on held-out text."""

    loss: float
    """Language-model loss, nats per target token."""
    tokens: int
    """Target tokens."""


class Heldout:
    """The held-out split, read in the same order at every evaluation.

    `rows` limits how much is read, rounded up to whole batches; None reads everything. Raises
    DataError where the shards hold no held-out document.
    """

    def __init__(self, config: RunConfig, grid: Grid, rows: int | None = None) -> None:
        self.grid = grid
        self.loader = Loader(config.data, config.seed, grid.rank, grid.world_size, "heldout")
        self.steps = self.loader.num_steps
        if rows is not None:
            self.steps = min(self.steps, -(-rows // config.data.batch_rows))

    def unigram_entropy(self) -> float:
        """Nats per target of the best guess that ignores the context, on the same rows."""
        return self.loader.unigram_entropy(self.steps)

    @torch.no_grad()
    def evaluate(self, model: V4Model) -> Evaluation:
        """Loss of `model`; every rank of the grid takes part and gets the same result."""
        device = self.grid.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for step in range(self.steps):
            for batch in self.loader.at(step):
                targets = int((batch.targets != _IGNORE).sum())
                if targets == 0:
                    continue  # a row that only fills up the last batch
                layout = SampleLayout.from_lengths(batch.lengths, batch.tokens.shape[1], device)
                out = model(batch.tokens.to(device), layout, batch.targets.to(device), _SUMS)
                assert out.lm_loss is not None
                total[0] += out.lm_loss.double()
                total[1] += targets
        summed, tokens = sum_(total, self.grid.data).tolist()
        return Evaluation(summed / tokens, int(tokens))
