"""The figures of `v4 data report`, from the manifest and the shards."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.indexed import open_cache, open_shard
from data.manifest import FilterStats, Manifest
from data.rows import Loader, MixtureAudit, audit_mixture, pack_windows, shuffled
from data.storage import as_path
from data.text import Tokenizer

_COUNTED = 2_000_000  # tokens of a source whose values are counted
_WORDS_FROM = 200_000  # tokens of a source that are decoded to find words
_WORD = re.compile(r"\w{2,60}")
_LISTED = 20
_MEASURED = 4_000_000  # tokens of the stream


@dataclass(frozen=True)
class SourceFacts:
    """One source: documents and tokens of its shards.

    `lengths` are those of the training documents, in tokens.
    """

    name: str
    domain: str
    documents: int
    empty: int
    bad: int
    filtered: dict[str, FilterStats]
    masked: FilterStats
    train_tokens: int
    validation_tokens: int
    bytes: int
    lengths: NDArray[np.int64]
    sample: list[NDArray[np.int64]]


@dataclass(frozen=True)
class DataFacts:
    """All sources and how their documents fill rows.

    `cut_best_fit` and `cut_concatenated` are the documents that are split; `fill` is the fraction
    of positions in packed rows that hold a token.
    """

    sources: list[SourceFacts]
    rows: int
    fill: float
    cut_best_fit: int
    rows_concatenated: int
    cut_concatenated: int

    @property
    def train_documents(self) -> int:
        """Number of training documents."""
        return sum(len(source.lengths) for source in self.sources)

    @property
    def counted(self) -> int:
        """Number of tokens in the samples."""
        return sum(len(document) for source in self.sources for document in source.sample)

    @property
    def words_from(self) -> int:
        """Number of tokens from which words are decoded."""
        return sum(len(document) for source in self.sources for document in _head(source))


def collect(config: DataConfig, seq_len: int, vocab_size: int) -> DataFacts:
    """Reads the manifest, all lengths, and the tokens of a bounded sample.

    Raises DataError where the shards are missing or damaged, or have an id of `vocab_size`, the
    tokenizer's, or more: other tools pad theirs.
    """
    manifest = Manifest.load(config.shards)
    names = dict.fromkeys(shard.source for shard in manifest.shards)
    sources = [_source(config, manifest, name, vocab_size) for name in names]
    # A document of n tokens takes n-1 positions, an empty one none.
    positions = np.maximum(np.concatenate([source.lengths for source in sources]) - 1, 0)
    order = shuffled(len(positions), 0)
    packed = pack_windows(positions, seq_len, order, config.packing_window)
    ends = np.cumsum(positions[order])
    begins = ends - positions[order]
    crossing = begins // seq_len != np.maximum(ends - 1, begins) // seq_len
    return DataFacts(
        sources=sources,
        rows=len(packed),
        fill=float(positions.sum()) / max(1, len(packed) * seq_len),
        cut_best_fit=int((positions > seq_len).sum()),
        rows_concatenated=-(-int(positions.sum()) // seq_len),
        cut_concatenated=int(crossing.sum()),
    )


def measured_mixture(loader: Loader) -> MixtureAudit:
    """The mixture over the first steps: some millions of tokens, the first epoch or phase."""
    phase = loader.schedule.phases[0]
    steps = -(-_MEASURED // (phase.global_batch_size * phase.seq_len))
    return audit_mixture(loader, min(steps, loader.num_steps, phase.steps or steps))


def _source(config: DataConfig, manifest: Manifest, name: str, vocab_size: int) -> SourceFacts:
    shards = [shard for shard in manifest.shards if shard.source == name]
    lengths: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    sample: list[NDArray[np.int64]] = []
    left = _COUNTED
    for shard in shards:
        if shard.split != "train":
            continue
        path = as_path(config.shards) / manifest.folder / shard.name
        size = min(manifest.vocab_size, vocab_size)
        opened = open_shard(
            path, shard.documents, shard.tokens, size, manifest.document_ends, open_cache(config)
        )
        lengths.append(opened.lengths.astype(np.int64))
        for document in range(len(opened)):
            if left <= 0:
                break
            sample.append(opened.read(document, 0, left).astype(np.int64))
            left -= len(sample[-1])
    tokens = {split: sum(s.tokens for s in shards if s.split == split) for split in _SPLITS}
    return SourceFacts(
        name=name,
        domain=shards[0].domain,
        documents=sum(shard.documents for shard in shards),
        empty=manifest.empty_documents.get(name, 0),
        bad=manifest.bad_records.get(name, 0),
        filtered=manifest.dropped.get(name, {}),
        masked=manifest.masked.get(name, FilterStats()),
        train_tokens=tokens["train"],
        validation_tokens=tokens["validation"],
        bytes=sum(shard.bytes for shard in shards),
        lengths=np.concatenate(lengths),
        sample=sample,
    )


_SPLITS = ("train", "validation")


def _head(source: SourceFacts) -> list[NDArray[np.int64]]:
    """Returns the first documents of a source's sample, about `_WORDS_FROM` tokens."""
    head, total = [], 0
    for document in source.sample:
        if total >= _WORDS_FROM:
            break
        head.append(document[: _WORDS_FROM - total])
        total += len(head[-1])
    return head


def longest_tokens(tokenizer: Tokenizer, facts: DataFacts) -> list[tuple[str, int, int]]:
    """Returns (text, characters, occurrences in the sample) of the longest tokens first."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for source in facts.sources:
        for document in source.sample:
            counts += np.bincount(document, minlength=tokenizer.vocab_size)
    named = set(tokenizer.special.values())
    texts = [(tokenizer.decode([i]), i) for i in range(tokenizer.vocab_size) if i not in named]
    # Ids that a small training sample left unused look like special tokens.
    real = [(text, i) for text, i in texts if not text.startswith("<｜unused▁")]
    longest = sorted(real, key=lambda pair: (-len(pair[0]), pair[1]))[:_LISTED]
    return [(text, len(text), int(counts[i])) for text, i in longest]


def most_split_words(tokenizer: Tokenizer, facts: DataFacts) -> list[tuple[str, int, int]]:
    """Returns (word, tokens, occurrences) of the sampled words with the most tokens first."""
    words: Counter[str] = Counter()
    special = list(tokenizer.special.values())
    for source in facts.sources:
        for document in _head(source):
            ordinary = document[~np.isin(document, special)]
            words.update(_WORD.findall(tokenizer.decode(ordinary.tolist())))
    often = [word for word, count in words.items() if count > 1]
    sizes = [len(ids) for ids in tokenizer.encode_batch(often)]
    ranked = sorted(zip(often, sizes, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [(word, size, words[word]) for word, size in ranked[:_LISTED]]
