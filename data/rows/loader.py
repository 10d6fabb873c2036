"""The rows of a step as a function of (seed, step): any rank can ask for any step at any time.

A document of n tokens gives n-1 positions, each with the next token as its target: the first token
is never a target, and the last never an input. Where a document is cut between rows, the target of
a row's last position is the first token of the next piece, so every token but the first is
predicted exactly once an epoch.

Step -> phase and row numbers (mixture.Schedule) -> window and its row -> pieces -> tokens. Only the
most recently used windows stay in memory.

Letters: B rows of a microbatch, S row length (`seq_len`), V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.manifest import Split
from data.rows.fetch import ByteRange
from data.rows.mixture import Schedule, plan_windows, shares
from data.rows.permutation import key_of
from data.rows.shards import (
    check_presence,
    content_digest,
    matching_manifest,
    open_fetcher,
    open_split,
    tables_folder,
)
from data.rows.stream import SourceStream
from data.rows.targets import IGNORE_INDEX, AssistantLoss, fill, unigram_entropy
from data.rows.transforms import FIM_EXTRA, cached_tables, fim_ids, splittable_counts, transform
from data.rows.window import Window, build_window
from data.text import Tokenizer

_CACHED_WINDOWS = 2
_WINDOW = 7  # purpose of a key


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank.

    Attributes:
        tokens [B, S] int64: inputs; pad ids after a row's last sample.
        targets [B, S] int64: the next token of the same document; IGNORE_INDEX where there is none.
        lengths: per row the lengths of its samples, in order; they sum to at most S. A row without
            samples is padding, for a step whose rows do not divide evenly among the ranks.
        signals: what an objective other than cross-entropy needs to know of every position, by
            name, [B, S] or [B, S, X]; the loader has none.
    """

    tokens: Tensor
    targets: Tensor
    lengths: list[list[int]]
    signals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A place in the data of a run, from which it can be read on.

    Attributes:
        step: its first step.
        row: number of its first row in the windows from `offsets` on.
        group: rows after which the sources' shares are balanced in the phase of `step`.
        offsets: position in each source's stream at row 0, by name; 0 for others.
    """

    step: int
    row: int
    group: int
    offsets: dict[str, int]


class Loader:
    """Batches of one split, for one rank.

    Arguments:
        config: where the shards are, and the sizes of a step.
        seed: decides the order of documents and rows of "train".
        rank, world: this rank among those that share a step's rows.
        split: "train" continues indefinitely, epoch after epoch in a new order; "validation" has
            `num_steps` steps in one shuffled order whatever the seed, untransformed and
            unweighted, the last one padded with empty rows.
        phases: row sizes and weights of "train", phase after phase; by default a single phase of
            the config's sizes.
        source: name of the only source to read, if given; the schedule stays the same.

    Attributes:
        manifest: of the shards; `manifest.vocab_size` must fit the model.
        digest: identifies the documents of the shards.
        sources: the streams of documents.
        start: where the loader begins.
        num_rows: rows in one epoch of the whole split; with weights, of the slowest source.
        num_targets: tokens predicted in one epoch, before the transforms.
        num_steps: steps in one epoch, the last one perhaps not full.
        fim_ids [3], split_table [V, 2]: as in data.rows.transforms; zeros and empty where not in
            use.

    Raises DataError where the shards are missing, damaged, made with another tokenizer, or empty
    for this split, and where the tokenizer lacks what `assistant_only_loss` needs.
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
        self.config, self.split = config, split
        self.seed = seed if split == "train" else 0
        self.rank, self.world = rank, world
        self.manifest = matching_manifest(config)
        self.digest = content_digest(config, self.manifest)
        opened = open_split(config, self.manifest, self.digest, split, source)
        self._presence = check_presence(config, self.manifest, opened.values())
        self._fetcher = open_fetcher(config, opened.values(), self._ranges_of)
        self.sources = [SourceStream(name, opened[name], self.seed) for name in opened]
        train = split == "train"
        self.transforms = config.transforms if train else None
        self._prepare_transforms()
        self._assistant_loss = AssistantLoss(config, [source.name for source in self.sources])
        self.schedule = Schedule(phases if train and phases else (config.one_phase(),))
        self.weights = [
            (config.source_weights if phase.source_weights is None else phase.source_weights)
            if train
            else {}
            for phase in self.schedule.phases
        ]
        growths = self._growths()
        self.plans = [
            plan_windows(config, phase, self.sources, weights, growths)
            for phase, weights in zip(self.schedule.phases, self.weights, strict=True)
        ]
        self.start_at(Place(0, 0, self.schedule.phases[0].global_batch_size, {}))
        self._window = lru_cache(maxsize=_CACHED_WINDOWS)(self._make_window)
        plan = self.plans[0]
        self.num_rows = plan.rows * max(
            -(-source.positions * plan.parts // take)
            for source, take in zip(self.sources, plan.take, strict=True)
            if take
        )
        self.num_targets = sum(source.positions for source in self.sources)
        self.num_steps = -(-self.num_rows // self.schedule.phases[0].global_batch_size)

    def start_at(self, place: Place) -> None:
        """Begins at a place in the data; call it before the first batch is read.

        Later steps and phases follow from there.
        """
        self.start = place
        self.schedule = Schedule(self.schedule.phases, (place.step, place.row))
        first = self.schedule.first_phase
        names = [source.name for source in self.sources]
        self._offsets = [[place.offsets.get(name, 0) for name in names] for _ in range(first + 1)]
        for index in range(first, len(self.plans) - 1):
            rows = self.schedule.rows_in(index) or 0
            self._offsets.append(self._stream_offsets(index, rows))

    def place_of(self, step: int) -> Place:
        """The place at which a loader begins that is to read the same rows from a step on."""
        index, numbers = self.schedule.rows_of(step)
        return Place(step, numbers.start, self._group(index), self._by_name(self._offsets[index]))

    def after_window(self, step: int) -> tuple[Place, int]:
        """The place after the window in which a step begins, and the window's rows that are left.

        From there nothing is read twice, whatever the rows are like.
        """
        index, numbers = self.schedule.rows_of(step)
        size, total = self.plans[index].rows, self.schedule.rows_in(index)
        end = -(-numbers.start // size) * size
        end = end if total is None else min(end, total)
        offsets = self._by_name(self._stream_offsets(index, end))
        return Place(step, 0, self._group(index), offsets), end - numbers.start

    def _by_name(self, offsets: list[int]) -> dict[str, int]:
        return {source.name: at for source, at in zip(self.sources, offsets, strict=True)}

    def _group(self, index: int) -> int:
        """Rows after which the sources' shares are balanced: once begun, the same in a phase."""
        if index == self.schedule.first_phase:
            return self.start.group
        return self.schedule.phases[index].global_batch_size

    def at(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step.

        Of the step's n rows, in a fixed global order, rank r gets the contiguous rows
        [r·n/world, (r+1)·n/world). Where `world` does not divide n, n is rounded up with rows
        without samples: every rank has the same number of batches of the same shapes.
        """
        self._presence.raise_problem()
        if self._fetcher is not None:
            self._fetcher.prepare(step)
        phase = self.schedule.phases[self.schedule.phase_of(step)]
        rows = self._own_rows(step)
        batches = [
            self._batch(phase, rows[first : first + phase.micro_batch_size])
            for first in range(0, len(rows), phase.micro_batch_size)
        ]
        self._presence.begin()  # of many shards, not before the first batch
        return batches

    def _own_rows(self, step: int) -> list[tuple[Window, int] | None]:
        _, numbers = self.schedule.rows_of(step)
        per_rank = -(-len(numbers) // self.world)
        places = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        return [self.packed_row(step, i) if i < len(numbers) else None for i in places]

    def _ranges_of(self, step: int, now: int) -> list[ByteRange] | None:
        """What this rank reads of objects in a step; None where its window is not to be made yet.

        That is after the window that follows the one of step `now`: only two are held.
        """
        (phase, first), (index, numbers) = map(self.schedule.rows_of, (now, step))
        size = self.plans[phase].rows
        last_window = first.start // size + _CACHED_WINDOWS - 1
        if index != phase or (step > now and (numbers.stop - 1) // size > last_window):
            return None
        ranges = []
        for window, row in filter(None, self._own_rows(step)):
            for document, start, length in window.packed.row(row):
                source, number, begin, end = self._read_of(window, document, start, length)
                found = source.source.byte_range(number, begin, end)
                if found is not None and found.end > found.start:
                    ranges.append(found)
        return ranges

    def _read_of(
        self, window: Window, document: int, start: int, length: int
    ) -> tuple[SourceStream, int, int, int | None]:
        """(source, document in it, first and last token) that a piece of a window reads."""
        source = self.sources[window.source[document]]
        number = int(window.document[document])
        is_masked = self._assistant_loss.applies[window.source[document]]
        if is_masked or window.splits[document] or window.fim[document]:
            return source, number, 0, None
        return source, number, start, start + length + 1

    def packed_row(self, step: int, place: int) -> tuple[Window, int] | None:
        """The window and the index of its packed row at `place` of a step; None for padding."""
        phase, numbers = self.schedule.rows_of(step)
        number = numbers[place]
        if self.split == "validation" and number >= self.num_rows:
            return None
        window_number, row = divmod(number, self.plans[phase].rows)
        window = self._window(phase, window_number)
        return window, int(window.order[row])

    def epochs_of(self, step: int) -> dict[str, float]:
        """How many epochs of each source the steps before `step` have read, by name."""
        index, numbers = self.schedule.rows_of(step)
        positions = (
            offset + self.plans[index].end(s, numbers.start)
            for s, offset in enumerate(self._offsets[index])
        )
        return {s.name: p / s.positions for s, p in zip(self.sources, positions, strict=True)}

    def unigram_entropy(self, steps: int | None = None) -> float:
        """Entropy in nats per target of this split's targets, over its first `steps` steps.

        All ranks' rows count, whatever the rank; the default is one epoch.
        """
        steps = self.num_steps if steps is None else steps
        return unigram_entropy(b.targets for step in range(steps) for b in self.all_rows(step))

    def all_rows(self, step: int) -> Iterator[Batch]:
        """Yields all ranks' rows of a step, each as a batch of one row."""
        index, numbers = self.schedule.rows_of(step)
        for place in range(len(numbers)):
            yield self._batch(self.schedule.phases[index], [self.packed_row(step, place)])

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yields one epoch of steps, from step 0."""
        return (self.at(step) for step in range(self.num_steps))

    def _prepare_transforms(self) -> None:
        """Loads the FIM ids, the split table, and each document's number of splittable tokens."""
        transforms = self.transforms
        self.fim_ids = np.zeros(3, dtype=np.int64)
        self.split_table = np.zeros((0, 2), dtype=np.int64)
        self._counts: list[Any] = [None] * len(self.sources)
        if transforms is None:
            return
        domains = {source.domain for source in self.sources}
        fim = transforms.fim_rate > 0 and domains & set(transforms.fim_domains)
        if not fim and not transforms.punctuation_split_rate:
            return
        root = tables_folder(self.config, self.manifest)
        path, size = self.config.tokenizer.path, self.manifest.vocab_size
        ids, table = cached_tables(root, path, size, self._cache_key)
        if fim and not len(ids):
            fim_ids(Tokenizer(self.config.tokenizer.path))  # raises and names the missing token
        if fim:
            self.fim_ids = ids
        if transforms.punctuation_split_rate:
            self.split_table = table
            self._counts = [self._source_counts(source) for source in self.sources]

    def _source_counts(self, source: SourceStream) -> NDArray[np.int64]:
        return np.concatenate(
            [
                splittable_counts(shard, self.split_table, self._cache_key)
                for shard in source.source.shards()
            ]
        )

    @property
    def _cache_key(self) -> str:
        """What the caches among the shards depend on."""
        return f"{self.manifest.tokenizer_hash} {self.digest}"

    def has_shards(self, digest: str) -> bool:
        """Whether a checkpoint with this digest was trained on these shards.

        Earlier versions saved the manifest's own digest.
        """
        return digest in (self.digest, self.manifest.digest)

    def configured_shares(self, phase: int) -> dict[str, float]:
        """Each source's share of a phase's tokens, as configured: by weights or by size."""
        names = [source.name for source in self.sources]
        by_source = shares(self.sources, self.weights[phase], self._growths())
        return dict(zip(names, by_source, strict=True))

    def _growths(self) -> list[float]:
        return [self._growth(index) for index in range(len(self.sources))]

    def _growth(self, index: int) -> float:
        """The factor by which the transforms are expected to lengthen a source."""
        transforms, source = self.transforms, self.sources[index]
        if transforms is None:
            return 1.0
        extra = 0.0
        if source.domain in transforms.fim_domains:
            extra += FIM_EXTRA * transforms.fim_rate * source.documents
        if self._counts[index] is not None:
            extra += transforms.punctuation_split_rate * float(self._counts[index].sum())
        return 1.0 + extra / source.positions

    def _stream_offsets(self, index: int, row: int) -> list[int]:
        """The position in each source's stream before row `row` of a phase."""
        if row == 0:
            return self._offsets[index]
        plan, length = self.plans[index], self.schedule.phases[index].seq_len
        return [
            source.snap(offset + plan.end(s, row), length, plan.slack)
            for s, (source, offset) in enumerate(
                zip(self.sources, self._offsets[index], strict=True)
            )
        ]

    def _make_window(self, index: int, number: int) -> Window:
        phase, plan = self.schedule.phases[index], self.plans[index]
        total = self.schedule.rows_in(index)
        first, last = number * plan.rows, (number + 1) * plan.rows
        last = last if total is None else min(last, total)
        begins, ends = self._stream_offsets(index, first), self._stream_offsets(index, last)
        intervals = [
            (s, source, source.between(begins[s], ends[s])) for s, source in enumerate(self.sources)
        ]
        return build_window(
            intervals,
            self._counts,
            self.transforms,
            phase.seq_len,
            last - first,
            self.config.packing,
            key_of(self.seed, _WINDOW, index, number),
            self._group(index),
            first,
        )

    def _batch(self, phase: DataPhase, rows: list[tuple[Window, int] | None]) -> Batch:
        shape = (len(rows), phase.seq_len)
        tokens = np.full(shape, self.manifest.pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        lengths: list[list[int]] = []
        for b, row in enumerate(rows):
            lengths.append([] if row is None else self._fill(tokens[b], targets[b], *row))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), lengths)

    def _fill(
        self, tokens_S: np.ndarray, targets_S: np.ndarray, window: Window, row: int
    ) -> list[int]:
        """Writes a packed row; returns the lengths of its samples."""
        position = 0
        lengths = []
        for document, start, length in window.packed.row(row):
            source, number, first, end = self._read_of(window, document, start, length)
            ids = source.tokens_of(number, first, end)
            splits, fim = int(window.splits[document]), int(window.fim[document])
            if splits or fim:
                key = window.key[document]
                ids = transform(ids, self.split_table, splits, fim, self.fim_ids, key)
            start -= first
            fill(ids, start, length, tokens_S, targets_S, position)
            if self._assistant_loss.applies[window.source[document]]:
                self._assistant_loss.mask(ids, start, targets_S[position : position + length])
            position += length
            lengths.append(length)
        return lengths
