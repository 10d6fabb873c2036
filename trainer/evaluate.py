"""Loss on held-out rows: the token mean over the split, the same at any number of ranks."""

from dataclasses import dataclass

import torch

from data import Loader
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.parallel.collectives import sum_
from trainer.parallel.grid import Grid

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
        self.loader = Loader(config.data, config.seed, grid.data.rank, grid.data.size, "heldout")
        self.steps = self.loader.num_steps
        if rows is not None:
            self.steps = min(self.steps, -(-rows // config.data.batch_rows))

    def unigram_entropy(self) -> float:
        """Nats per target of the best guess that ignores the context, on the same rows."""
        return self.loader.unigram_entropy(self.steps)

    def evaluate(self, engine: Engine) -> Evaluation:
        """Loss of the engine's model; every rank of the grid takes part and gets the same."""
        total = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        targets = torch.zeros((), dtype=torch.float64)
        for step in range(self.steps):
            batches = self.loader.at(step)
            total += engine.evaluate(batches)
            targets += sum(int((batch.targets != _IGNORE).sum()) for batch in batches)
        tokens = int(sum_(targets, self.grid.data))
        return Evaluation(float(total) / tokens, tokens)
