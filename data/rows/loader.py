"""The rows of a step as a function of (seed, step): any rank can ask for any step at any time.

A document of n tokens gives n-1 positions, each with the next token as its target: the first token
is predicted by nothing, and the last is read by nothing. Where a document is cut between rows, the
target of a row's last position is the first token of the next piece, so every token but the first
is predicted exactly once an epoch.

Step -> phase, and the rows' numbers in it (mixture.Schedule) -> window and row -> pieces -> tokens.
Only the last windows used are held.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.files import sha256_of
from data.indexed import open_shard
from data.manifest import Manifest, Split
from data.rows.mixture import Schedule, plan_windows, shares
from data.rows.permutation import key_of
from data.rows.stream import SourceStream
from data.rows.transforms import FIM_EXTRA, fim_ids, kept_tables, splittable_counts, transformed
from data.rows.window import Window, build_window
from data.text.tokenizer import Tokenizer, tokenizer_file

NO_TARGET = -100
_WINDOWS = 2  # held at a time
_WINDOW = 7  # what a key is for


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


@dataclass(frozen=True)
class Part:
    """One shard: its tokens, and per document its length and its first token's place."""

    tokens: NDArray[Any]
    sequence_lengths: NDArray[np.int32]
    starts: NDArray[np.int64]
    file: Any
    """The open index, which unmaps the arrays when it goes."""


class Loader:
    """Batches of one split, for one rank.

    Arguments:
        config: where the shards are, and the sizes of a step.
        seed: decides the order of documents and rows of "train".
        rank, world: this rank among those that share a step's rows.
        split: "train" goes on for ever, epoch after epoch in a new order; "validation" has
            `num_steps` steps, in one mixed order whatever the seed, untransformed and unweighted,
            the last filled up with empty rows.
        phases: what the rows of "train" are, part after part; by default one for ever, of the
            config's sizes.
        source: the only one whose documents are read, if given; the schedule stays.

    Attributes:
        manifest: of the shards; `manifest.vocab_size` must fit the model.
        sources: the streams of documents.
        num_rows: rows in one epoch of the whole split; with weights, of the slowest source.
        num_targets: tokens predicted in one epoch, before the transforms.
        num_steps: steps in one epoch, the last one perhaps not full.
        fim_ids [3], split_table [V, 2]: as in data.transforms; zeros and empty where not in use.

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
        phases: Sequence[DataPhase] = (),
        source: str | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not one of {world} ranks.")
        self.config, self.split, self.source = config, split, source
        self.seed = seed if split == "train" else 0
        self.rank, self.world = rank, world
        self.manifest = _matching_manifest(config)
        self.sources = self._open()
        train = split == "train"
        self.transforms = config.transforms if train else None
        self._prepare_transforms()
        self.schedule = Schedule(phases if train and phases else (config.one_phase(),))
        self.weights = [
            (config.weights if phase.weights is None else phase.weights) if train else {}
            for phase in self.schedule.phases
        ]
        growth = [self._growth(index) for index in range(len(self.sources))]
        self.plans = [
            plan_windows(config, phase, self.sources, weights, growth)
            for phase, weights in zip(self.schedule.phases, self.weights, strict=True)
        ]
        self._offsets = [[0] * len(self.sources)]
        for index in range(len(self.plans) - 1):
            rows = self.schedule.rows_in(index) or 0
            self._offsets.append(self._edges(index, rows))
        self._window = lru_cache(maxsize=_WINDOWS)(self._make_window)
        plan = self.plans[0]
        self.num_rows = plan.rows * max(
            -(-source.positions * plan.parts // take)
            for source, take in zip(self.sources, plan.take, strict=True)
            if take
        )
        self.num_targets = sum(source.positions for source in self.sources)
        self.num_steps = -(-self.num_rows // self.schedule.phases[0].global_batch_size)

    def at(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step.

        The step's rows, in a fixed global order, are dealt out in runs: rank r gets rows
        [r·n/world, (r+1)·n/world). Where `world` does not divide the step's rows, every rank gets
        the next whole number of rows, and rows without samples fill up the end: every rank has the
        same number of batches of the same shapes.
        """
        index, numbers = self.schedule.rows_of(step)
        phase = self.schedule.phases[index]
        per_rank = -(-len(numbers) // self.world)
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        rows = [self.row_at(step, place) if place < len(numbers) else None for place in mine]
        return [
            self._batch(phase, rows[first : first + phase.micro_batch_size])
            for first in range(0, per_rank, phase.micro_batch_size)
        ]

    def row_at(self, step: int, place: int) -> tuple[Window, int] | None:
        """The window and its packed row at `place` of a step; None for a filler."""
        index, numbers = self.schedule.rows_of(step)
        number = numbers[place]
        if self.split == "validation" and number >= self.num_rows:
            return None
        which, row = divmod(number, self.plans[index].rows)
        window = self._window(index, which)
        return window, int(window.order[row])

    def epochs_of(self, step: int) -> dict[str, float]:
        """How many times each source has been seen when `step` begins."""
        index, numbers = self.schedule.rows_of(step)
        taken = (
            offset + self.plans[index].end(s, numbers.start)
            for s, offset in enumerate(self._offsets[index])
        )
        return {s.name: t / s.positions for s, t in zip(self.sources, taken, strict=True)}

    def unigram_entropy(self, steps: int | None = None) -> float:
        """Entropy in nats per target of the split's own targets, over its first `steps` steps.

        All ranks' rows count, whatever the rank; the default is one epoch.
        """
        steps = self.num_steps if steps is None else steps
        return unigram_entropy(batch.targets for step in range(steps) for batch in self.whole(step))

    def whole(self, step: int) -> Iterator[Batch]:
        """All ranks' rows of a step, one by one."""
        index, numbers = self.schedule.rows_of(step)
        for place in range(len(numbers)):
            yield self._batch(self.schedule.phases[index], [self.row_at(step, place)])

    def __iter__(self) -> Iterator[list[Batch]]:
        """One epoch of steps, from step 0."""
        return (self.at(step) for step in range(self.num_steps))

    def _open(self) -> list[SourceStream]:
        root = Path(self.config.shards) / self.manifest.folder
        found: dict[str, list[Part]] = {}
        self._prefixes: dict[str, list[Path]] = {}
        domains: dict[str, str] = {}
        for shard in self.manifest.of_split(self.split):
            if self.source not in (None, shard.source):
                continue
            found.setdefault(shard.source, []).append(
                _open_part(root / shard.name, shard.documents, shard.tokens)
            )
            self._prefixes.setdefault(shard.source, []).append(root / shard.name)
            domains[shard.source] = shard.domain
        if not found:
            raise DataError(
                f"the shards in {self.config.shards} hold no document of the {self.split} split; "
                "see `validation_fraction` and the sources' `split`."
            )
        return [
            SourceStream(name, domains[name], parts, self.seed) for name, parts in found.items()
        ]

    def _prepare_transforms(self) -> None:
        """The tokens of FIM, the table of splits, and how much of each document can be split."""
        transforms = self.transforms
        self.fim_ids = np.zeros(3, dtype=np.int64)
        self.split_table = np.zeros((0, 2), dtype=np.int64)
        self._counts: list[Any] = [None] * len(self.sources)
        if transforms is None:
            return
        domains = {source.domain for source in self.sources}
        fim = transforms.fim_rate > 0 and domains & set(transforms.fim_domains)
        if not fim and not transforms.split_share:
            return
        root = Path(self.config.shards) / self.manifest.folder
        ids, table = kept_tables(root, self.config.tokenizer.path)
        if fim and not len(ids):
            fim_ids(Tokenizer(self.config.tokenizer.path))  # says which token is missing
        if fim:
            self.fim_ids = ids
        if transforms.split_share:
            self.split_table = table
            self._counts = [self._source_counts(source) for source in self.sources]

    def _source_counts(self, source: SourceStream) -> NDArray[np.int64]:
        counted = zip(self._prefixes[source.name], source.parts, strict=True)
        return np.concatenate(
            [
                splittable_counts(p, part.tokens, part.starts, self.split_table)
                for p, part in counted
            ]
        )

    def wanted_shares(self, phase: int) -> dict[str, float]:
        """Each source's share of a phase's tokens, as configured: by weights or by size."""
        growth = [self._growth(index) for index in range(len(self.sources))]
        found = shares(self.sources, self.weights[phase], growth)
        return {source.name: share for source, share in zip(self.sources, found, strict=True)}

    def _growth(self, index: int) -> float:
        """By how much the transforms are expected to lengthen a source."""
        transforms, source = self.transforms, self.sources[index]
        if transforms is None:
            return 1.0
        extra = 0.0
        if source.domain in transforms.fim_domains:
            extra += FIM_EXTRA * transforms.fim_rate * source.documents
        if self._counts[index] is not None:
            extra += transforms.split_share * float(self._counts[index].sum())
        return 1.0 + extra / source.positions

    def _edges(self, index: int, row: int) -> list[int]:
        """Where each source's line stands before row `row` of a phase."""
        if row == 0:
            return self._offsets[index]
        plan, length = self.plans[index], self.schedule.phases[index].seq_len
        return [
            source.snapped(offset + plan.end(s, row), length, plan.slack)
            for s, (source, offset) in enumerate(
                zip(self.sources, self._offsets[index], strict=True)
            )
        ]

    def _make_window(self, index: int, which: int) -> Window:
        phase, plan = self.schedule.phases[index], self.plans[index]
        total = self.schedule.rows_in(index)
        first, last = which * plan.rows, (which + 1) * plan.rows
        last = last if total is None else min(last, total)
        edges = zip(self.sources, self._edges(index, first), self._edges(index, last), strict=True)
        parts = [(s, source, source.between(a, b)) for s, (source, a, b) in enumerate(edges)]
        return build_window(
            parts,
            self._counts,
            self.transforms,
            phase.seq_len,
            last - first,
            self.config.packing,
            key_of(self.seed, _WINDOW, index, which),
            phase.global_batch_size,
            first,
        )

    def _batch(self, phase: DataPhase, rows: list[tuple[Window, int] | None]) -> Batch:
        shape = (len(rows), phase.seq_len)
        tokens = np.full(shape, self.manifest.pad_id, dtype=np.int64)
        targets = np.full(shape, NO_TARGET, dtype=np.int64)
        lengths: list[list[int]] = []
        for b, row in enumerate(rows):
            lengths.append([] if row is None else self._fill(tokens[b], targets[b], *row))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), lengths)

    def _fill(
        self, tokens_S: np.ndarray, targets_S: np.ndarray, window: Window, row: int
    ) -> list[int]:
        """Write a packed row; returns the lengths of its samples."""
        position = 0
        lengths = []
        for document, start, length in window.packed.row(row):
            source = self.sources[window.source[document]]
            raw = self.document(source, int(window.document[document]))
            splits, fim = int(window.splits[document]), int(window.fim[document])
            if splits or fim:
                key = window.key[document]
                raw = transformed(raw, self.split_table, splits, fim, self.fim_ids, key)
            _copy(raw, start, length, tokens_S, targets_S, position)
            position += length
            lengths.append(length)
        return lengths

    def document(self, source: SourceStream, number: int) -> np.ndarray:
        """The ids of a source's document as the shard holds them, bos and eos included."""
        which = int(np.searchsorted(source.first_of_part, number, side="right")) - 1
        part, local = source.parts[which], number - int(source.first_of_part[which])
        start = int(part.starts[local])
        return part.tokens[start : start + int(part.sequence_lengths[local])]


@numba.njit(cache=True, nogil=True)
def _copy(
    raw: np.ndarray, start: int, length: int, tokens: np.ndarray, targets: np.ndarray, place: int
) -> None:
    for i in range(length):
        tokens[place + i] = raw[start + i]
        targets[place + i] = raw[start + i + 1]


def _open_part(prefix: Path, documents: int, tokens: int) -> Part:
    file = open_shard(prefix, documents, tokens)
    index = file.index
    ids = np.asarray(np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r"))
    starts = np.asarray(index.sequence_pointers) // ids.itemsize
    return Part(ids, np.asarray(index.sequence_lengths), starts, file)


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
