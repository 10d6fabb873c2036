"""Fill-in-the-middle and token splitting, per document, before packing.

Sources: report §4.1, DeepSeek-V3 report §4.1. Both are functions of (seed, source, document,
epoch), and the resulting length is known without reading a token: FIM adds 3, and splitting adds
one per split token, whose number follows from a count cached next to the shard.

FIM cuts between tokens: cutting inside one would need the tokenizer again in the loader, and the
length would no longer be known to packing. A special token is one token, so no cut is inside it.
PSM is `bos <begin> prefix <hole> suffix <end> middle eos`,
SPM is `bos <begin> <hole> suffix <end> prefix middle eos`.

Letters: V vocabulary.
"""

import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.errors import DataError
from data.files import write_atomically
from data.indexed import IndexedShard
from data.text import Tokenizer

Ints = NDArray[np.int64]
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
FIM_EXTRA = 3  # tokens that FIM adds to a document
NONE, PSM, SPM = 0, 1, 2  # kinds of FIM


def split_table(tokenizer: Tokenizer) -> Ints:
    """`Tokenizer.splittable` as an array [V, 2], -1 for the tokens that are never split."""
    table = np.full((tokenizer.vocab_size, 2), -1, dtype=np.int64)
    for i, pair in tokenizer.splittable().items():
        table[i] = pair
    return table


def fim_ids(tokenizer: Tokenizer) -> Ints:
    """Ids [3] of begin, hole and end. Raises DataError where the tokenizer lacks one."""
    missing = [token for token in FIM_TOKENS if token not in tokenizer.special]
    if missing:
        raise DataError(
            f"{tokenizer.path} has no token {missing[0]}; use another tokenizer, or set "
            "data.transforms.fim_rate=0."
        )
    return np.array([tokenizer.special[token] for token in FIM_TOKENS], dtype=np.int64)


def cached_tables(folder: Path, path: str, vocab_size: int, key: str) -> tuple[Ints, Ints]:
    """(`fim_ids`, `split_table`) of the tokenizer at `path`, cached in a file among the shards.

    Opening a tokenizer of 128K takes seconds, which the cache saves. The ids are empty where the
    tokenizer lacks one of them. The table has `vocab_size` rows or more: other tools pad theirs.
    """

    def compute() -> dict[str, Ints]:
        tokenizer = Tokenizer(path)
        complete = all(token in tokenizer.special for token in FIM_TOKENS)
        split = split_table(tokenizer)
        padding = np.full((max(0, vocab_size - len(split)), 2), -1)
        fim = fim_ids(tokenizer) if complete else np.zeros(0, dtype=np.int64)
        return {"fim": fim, "split": np.concatenate([split, padding])}

    arrays = _cached(folder / "transforms.npz", key, compute)
    return arrays["fim"], arrays["split"]


def splittable_counts(shard: IndexedShard, table: Ints, key: str) -> Ints:
    """Splittable tokens of each document [documents], cached in a file next to the shard."""

    def compute() -> dict[str, Ints]:
        parts = [
            _count(ids, np.append(0, np.cumsum(shard.lengths[first:end])), table)
            for first, end, ids in shard.blocks()
        ]
        return {"counts": np.concatenate([np.zeros(0, dtype=np.int64), *parts])}

    return _cached(Path(f"{shard.tables}.splittable.npz"), key, compute)["counts"]


def _cached(file: Path, key: str, compute: Callable[[], dict[str, Ints]]) -> dict[str, Ints]:
    """Arrays from a file that was written with the same key; else they are computed and written."""
    no_cache = suppress(ValueError, OSError, KeyError, zipfile.BadZipFile)
    with no_cache, np.load(file, allow_pickle=False) as cached:
        if str(cached["key"]) == key:
            return dict(cached)
    arrays = compute()
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, key=np.array(key), **arrays)
    with suppress(DataError):  # a shared corpus may be read-only
        write_atomically(file, stream.getvalue())
    return arrays


@compiled
def _count(tokens: NDArray[Any], bounds: Ints, table: Ints) -> Ints:
    counts = np.zeros(len(bounds) - 1, dtype=np.int64)
    for d in range(len(counts)):
        for i in range(bounds[d], bounds[d + 1]):
            counts[d] += table[tokens[i], 0] >= 0
    return counts


@compiled
def _mix(value: Any) -> Any:
    mixed = np.uint64(value) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@compiled
def transform(
    raw: NDArray[Any], table: Ints, splits: int, fim: int, fim_tokens: Ints, key: Any
) -> Ints:
    """The document `raw` (bos … eos) with `splits` of its tokens split, then of the kind `fim`.

    `key` decides which tokens are split, all choices being equally likely, and where FIM cuts.
    """
    whole = np.empty(len(raw) + splits, dtype=np.int64)
    state: Any = key
    place: Any = 0
    left = splits
    able = 0
    if splits > 0:
        for token in raw:
            able += table[token, 0] >= 0
    for token in raw:
        if left > 0 and table[token, 0] >= 0:
            state = _mix(state)
            if state % np.uint64(able) < np.uint64(left):
                whole[place] = table[token, 0]
                whole[place + 1] = table[token, 1]
                place, left = place + 2, left - 1
                able -= 1
                continue
            able -= 1
        whole[place] = token
        place += 1
    if fim == 0:
        return whole
    text = len(whole) - 2
    state = _mix(state)
    one = 1 + np.int64(state % np.uint64(text + 1))
    state = _mix(state)
    two = 1 + np.int64(state % np.uint64(text + 1))
    begin, end = min(one, two), max(one, two)
    out = np.empty(len(whole) + 3, dtype=np.int64)
    out[0], out[1], last = whole[0], fim_tokens[0], len(whole) - 1
    place = 2
    if fim == 1:
        out[place : place + begin - 1] = whole[1:begin]
        place += begin - 1
    out[place] = fim_tokens[1]
    place += 1
    out[place : place + last - end] = whole[end:last]
    place += last - end
    out[place] = fim_tokens[2]
    place += 1
    first = begin if fim == 1 else 1
    out[place : place + end - first] = whole[first:end]
    out[len(out) - 1] = whole[last]
    return out
