"""The rows of a step as a function of (seed, step): any rank can ask for any step at any time.

A document of n tokens gives n-1 positions, each with the next token as its target: the first token
is predicted by nothing, and the last is read by nothing. Where a document is cut between rows, the
target of a row's last position is the first token of the next piece, so every token but the first
is predicted exactly once an epoch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.errors import DataError
from data.files import sha256_of
from data.indexed import open_shard
from data.manifest import Manifest, Split
from data.packing import pack_windows
from data.permutation import key_of, permuted, shuffled
from data.tokenizer import tokenizer_file

NO_TARGET = -100
_DOCUMENTS, _ROWS = 1, 2  # what a key is for


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank.

    Attributes:
        tokens [B, S] int64: inputs; the end of a row that no sample fills holds the pad id.
        targets [B, S] int64: the next token of the same document; -100 where there is none.
        lengths: per row the lengths of its samples, in order; they sum to at most S. A row without
            samples (all padding) fills up a step whose rows the ranks cannot share evenly.
    """

    tokens: Tensor
    targets: Tensor
    lengths: list[list[int]]


class Loader:
    """Batches of one split, for one rank.

    Arguments:
        config: where the shards are, and the sizes of a step.
        seed: decides the order of documents and rows of "train".
        rank, world: this rank among those that share a step's rows.
        split: "train" goes on for ever, epoch after epoch in a new order; "heldout" has
            `num_steps` steps, in one mixed order whatever the seed, the last filled up with
            empty rows.

    Attributes:
        manifest: of the shards; `manifest.vocab_size` must fit the model.
        num_rows: rows in one epoch.
        num_targets: tokens predicted in one epoch.
        num_steps: steps in one epoch, the last one perhaps not full.

    Raises DataError where the shards are missing, damaged, made with another tokenizer, or hold
    nothing for this split.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        split: Split = "train",
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not one of {world} ranks.")
        self.config, self.split = config, split
        self.seed = seed if split == "train" else 0
        self.rank, self.world = rank, world
        self.manifest = _matching_manifest(config)
        root = Path(config.shards) / self.manifest.folder
        shards = self.manifest.of_split(split)
        if not shards:
            raise DataError(
                f"the shards in {config.shards} hold no document of the {split} split; "
                "see `heldout_fraction` and the sources' `split`."
            )
        self._shards = [open_shard(root / s.name, s.documents, s.tokens) for s in shards]
        positions = np.concatenate([shard.sequence_lengths for shard in self._shards]) - 1
        self._first = np.cumsum([0] + [len(shard) for shard in self._shards])
        order = shuffled(len(positions), key_of(self.seed, _DOCUMENTS))
        self._rows = pack_windows(positions, config.row_length, order, config.packing_window)
        self.num_rows = len(self._rows)
        self.num_targets = int(positions.sum())
        self.num_steps = -(-self.num_rows // config.batch_rows)

    def at(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step.

        The step's rows, in a fixed global order, are dealt out in runs: rank r gets rows
        [r·n/world, (r+1)·n/world). Where `world` does not divide `batch_rows`, every rank gets the
        next whole number of rows, and rows without samples fill up the end: every rank has the
        same number of batches of the same shapes.
        """
        config = self.config
        per_rank = -(-config.batch_rows // self.world)
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        rows = [self.row_at(step, place) if place < config.batch_rows else None for place in mine]
        return [
            self._batch(rows[first : first + config.micro_rows])
            for first in range(0, per_rank, config.micro_rows)
        ]

    def row_at(self, step: int, place: int) -> int | None:
        """Which packed row stands at `place` (0 … batch_rows-1) of a step; None for a filler."""
        epoch, index = divmod(step * self.config.batch_rows + place, self.num_rows)
        if self.split == "heldout" and epoch > 0:
            return None
        return permuted(index, self.num_rows, key_of(self.seed, _ROWS, epoch))

    def epoch_of(self, step: int) -> float:
        """How many times the data has been seen when `step` begins."""
        return step * self.config.batch_rows / self.num_rows

    def unigram_entropy(self, steps: int | None = None) -> float:
        """Entropy in nats per target of the split's own targets, over its first `steps` steps.

        All ranks' rows count, whatever the rank; the default is one epoch.
        """
        steps = self.num_steps if steps is None else steps
        rows = (self.row_at(s, p) for s in range(steps) for p in range(self.config.batch_rows))
        return unigram_entropy(self._targets(row) for row in rows if row is not None)

    def _targets(self, row: int) -> Tensor:
        pieces = [self._piece(*piece)[1:] for piece in self._rows.row(row)]
        return torch.from_numpy(np.concatenate(pieces))

    def _piece(self, document: int, start: int, length: int) -> np.ndarray:
        """The length+1 tokens from `start` on: inputs, and one further for the last target."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        local = int(document - self._first[shard])
        tokens = self._shards[shard].get(local, offset=start, length=length + 1)
        return tokens.astype(np.int64)

    def _batch(self, rows: list[int | None]) -> Batch:
        shape = (len(rows), self.config.row_length)
        tokens = np.full(shape, self.manifest.pad_id, dtype=np.int64)
        targets = np.full(shape, NO_TARGET, dtype=np.int64)
        lengths: list[list[int]] = []
        for b, row in enumerate(rows):
            pieces = [] if row is None else self._rows.row(row)
            position = 0
            for document, start, length in pieces:
                piece = self._piece(document, start, length)
                tokens[b, position : position + length] = piece[:-1]
                targets[b, position : position + length] = piece[1:]
                position += length
            lengths.append([length for _, _, length in pieces])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), lengths)

    def __iter__(self) -> Iterator[list[Batch]]:
        """One epoch of steps, from step 0."""
        return (self.at(step) for step in range(self.num_steps))


def unigram_entropy(targets: Iterable[Tensor]) -> float:
    """Entropy of the distribution of all targets taken together, in nats per target.

    The loss of the best model that ignores the context. Entries of -100 do not count; 0.0 where
    nothing counts.
    """
    counts = torch.zeros(0, dtype=torch.int64)
    for part in targets:
        found = torch.bincount(part[part != NO_TARGET].flatten(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    seen = counts[counts > 0].double()
    if not len(seen):
        return 0.0
    share = seen / seen.sum()
    return float(-(share * share.log()).sum())


def _matching_manifest(config: DataConfig) -> Manifest:
    manifest = Manifest.load(config.shards)
    file = tokenizer_file(config.tokenizer.path)
    if sha256_of(file) != manifest.tokenizer_hash:
        raise DataError(
            f"the shards in {config.shards} were made with another tokenizer than {file}; "
            "run `v4 data prepare CONFIG` again, or point `data.tokenizer.path` to the right one."
        )
    return manifest
