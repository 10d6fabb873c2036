"""Loss on validation rows: the token mean over the split, the same at any number of ranks."""

import math
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Loader, Prefetcher, Tokenizer
from data.activity import Activity
from model import IGNORE_INDEX
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.parallel.collectives import all_reduce_
from trainer.parallel.grid import Grid
from trainer.process.heartbeat import Heartbeat
from trainer.process.signals import StopRequest
from trainer.run_tokenizer import run_data


class EvaluationStopped(Exception):
    """An evaluation that ended early on all ranks, since one of them was asked to stop."""


def check_stop(stop: StopRequest, grid: Grid, progress: str) -> None:
    """Raises EvaluationStopped on all ranks where one of them was asked to stop.

    `progress` is what the message has of the work that is done.
    """
    requests = torch.tensor(float(stop.requested))
    if all_reduce_(requests, grid.world) > 0:
        raise EvaluationStopped(progress)


@dataclass(frozen=True)
class Evaluation:
    """The result on validation text."""

    loss: float
    """Language-model loss, nats per target token."""
    tokens: int
    """Target tokens."""
    bytes: int | None = None
    """Bytes of text that they stand for; None where the tokenizer's ids have no definite bytes."""

    @property
    def bits_per_byte(self) -> float | None:
        """The loss of all targets, those that end documents included, over the bytes of text."""
        return self.loss * self.tokens / (math.log(2) * self.bytes) if self.bytes else None


@dataclass(frozen=True)
class BySource:
    """The results on the text of each source, by its name."""

    evaluations: dict[str, Evaluation]

    @property
    def losses(self) -> dict[str, float]:
        """Losses in nats per target token."""
        return {name: evaluation.loss for name, evaluation in self.evaluations.items()}

    @property
    def bits_per_byte(self) -> dict[str, float] | None:
        """Bits per byte of text; None where the tokenizer's ids have no definite bytes."""
        pairs = [(n, e.bits_per_byte) for n, e in self.evaluations.items()]
        return {name: bits for name, bits in pairs if bits is not None} or None


class Validation:
    """The validation split, read in the same order at every evaluation.

    At most `evaluation.max_rows` are read, rounded up to full batches. Where `stop` is requested on
    a rank, all of them end the evaluation before the next batch. `heartbeat` gets every batch.
    `tokenizer` is the run's, by default opened here. Raises DataError where the shards hold no
    validation document.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        stop: StopRequest | None = None,
        heartbeat: Heartbeat | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config, self.grid, self.stop = config, grid, stop or StopRequest()
        self.heartbeat = heartbeat or Heartbeat()
        self._has_compiled = False
        lengths = (tokenizer or Tokenizer(run_data(config).tokenizer.path)).byte_lengths()
        self.byte_lengths = None if lengths is None else torch.from_numpy(lengths)
        self.rows = rows = config.evaluation.max_rows
        self.loader = self._loader(None)
        self.steps = self._steps(self.loader, rows)
        names = [source.name for source in self.loader.sources]
        several = config.evaluation.per_source and len(names) > 1
        self.sources = {name: self._loader(name) for name in names} if several else {}

    def _loader(self, source: str | None) -> Loader:
        config, axis = self.config, self.grid.data
        data = run_data(config)
        return Loader(data, config.seed, axis.rank, axis.size, "validation", source=source)

    def _steps(self, loader: Loader, rows: int | None) -> int:
        if rows is None:
            return loader.num_steps
        return min(loader.num_steps, -(-rows // self.config.data.global_batch_size))

    def unigram_entropy(self) -> float:
        """Returns nats per target of the best guess that ignores the context, on the same rows."""
        with Activity("unigram entropy", visible=self.grid.is_first):
            return self.loader.unigram_entropy(self.steps)

    def evaluate(self, engine: Engine) -> Evaluation:
        """Returns the loss of the engine's model, the same on every rank; all ranks call it.

        Raises EvaluationStopped on all ranks.
        """
        return self._mean_over(self.loader, self.steps, engine)

    def by_source(self, engine: Engine) -> BySource | None:
        """Returns what is measured on the rows of each source; all ranks call it.

        `evaluation.max_rows` is divided among the sources. None where there is one source, or
        `evaluation.per_source` is false. Raises EvaluationStopped on all ranks.
        """
        if not self.sources:
            return None
        rows = None if self.rows is None else -(-self.rows // len(self.sources))
        return BySource(
            {
                name: self._mean_over(loader, self._steps(loader, rows), engine)
                for name, loader in self.sources.items()
            }
        )

    def _mean_over(self, loader: Loader, steps: int, engine: Engine) -> Evaluation:
        total = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        counts = torch.zeros(2, dtype=torch.float64)  # targets, and their bytes
        pin = self.grid.device.type == "cuda"
        with (
            closing(Prefetcher(loader.at, self.config.data.prefetch, steps, pin)) as rows,
            Activity("validation", steps, "batches", self.grid.is_first) as activity,
        ):
            for step in range(steps):
                self.heartbeat.enter("reading data")
                batches = rows.at(step)
                self.heartbeat.enter("evaluation" if self._has_compiled else "first evaluation")
                check_stop(self.stop, self.grid, f"after {step} of {steps} batches")
                total += engine.evaluate(batches)
                self._has_compiled = True
                for batch in batches:
                    counts += self._count(batch.targets[batch.targets != IGNORE_INDEX])
                activity.advance()
        tokens, size = map(int, all_reduce_(counts, self.grid.data).tolist())
        return Evaluation(float(total) / tokens, tokens, size or None)

    def _count(self, targets: Tensor) -> Tensor:
        """Returns the number of targets and that of their bytes, 0 where these are not known."""
        lengths = self.byte_lengths
        size = 0 if lengths is None else int(lengths[targets].sum())
        return torch.tensor([len(targets), size], dtype=torch.float64)
