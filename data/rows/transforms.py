"""Fill-in-the-middle and token splitting, per document, before packing (REP 4.1, DeepSeek-V3 4.1).

Both are functions of (seed, source, document, epoch), and the length they give is known without
reading a token: FIM adds 3, and splitting adds one for each of a number of tokens that follows from
a count kept beside the shard.

FIM cuts between tokens: cutting inside one would need the tokenizer again in the loader, and the
length would no longer be known to packing. A special token is one token, so no cut is inside it.
PSM is `bos <begin> prefix <hole> suffix <end> middle eos`,
SPM is `bos <begin> <hole> suffix <end> prefix middle eos`.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files import write_atomically
from data.text.tokenizer import Tokenizer

Ints = NDArray[np.int64]
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
FIM_EXTRA = 3
NONE, PSM, SPM = 0, 1, 2


def split_table(tokenizer: Tokenizer) -> Ints:
    """[V, 2]: `Tokenizer.splittable` as an array, -1 for the tokens that stay whole."""
    table = np.full((tokenizer.vocab_size, 2), -1, dtype=np.int64)
    for i, pair in tokenizer.splittable().items():
        table[i] = pair
    return table


def fim_ids(tokenizer: Tokenizer) -> Ints:
    """[3]: ids of begin, hole and end. Raises DataError where the tokenizer has none."""
    missing = [token for token in FIM_TOKENS if token not in tokenizer.special]
    if missing:
        raise DataError(
            f"{tokenizer.path} has no token {missing[0]}; use another tokenizer, or set "
            "data.transforms.fim_rate=0."
        )
    return np.array([tokenizer.special[token] for token in FIM_TOKENS], dtype=np.int64)


def kept_tables(folder: Path, tokenizer_path: str) -> tuple[Ints, Ints]:
    """(ids of begin, hole and end, the split table), kept in a file among the shards.

    Opening a tokenizer of 128K takes seconds, which no rank needs to spend twice. The ids are none
    where the tokenizer lacks one. The folder's shards are of one tokenizer.
    """
    file = folder / "transforms.npz"
    if file.is_file():
        try:
            with np.load(file, allow_pickle=False) as found:
                return found["fim"], found["split"]
        except (ValueError, OSError, KeyError, zipfile.BadZipFile):
            pass  # made again
    tokenizer = Tokenizer(tokenizer_path)
    known = all(token in tokenizer.special for token in FIM_TOKENS)
    fim = fim_ids(tokenizer) if known else np.zeros(0, dtype=np.int64)
    split = split_table(tokenizer)
    stream = io.BytesIO()
    np.savez(stream, fim=fim, split=split)
    write_atomically(file, stream.getvalue())
    return fim, split


def splittable_counts(prefix: Path, tokens: NDArray[Any], starts: Ints, table: Ints) -> Ints:
    """[documents]: how many tokens of each can be split, kept in a file beside the shard."""
    file = Path(f"{prefix}.splittable.npy")
    if file.is_file():
        try:
            found = np.load(file, allow_pickle=False)
            if found.shape == (len(starts),):
                return found
        except (ValueError, OSError):
            pass  # made again
    counts = _count(tokens, np.append(starts, len(tokens)), table)
    stream = io.BytesIO()
    np.save(stream, counts, allow_pickle=False)
    write_atomically(file, stream.getvalue())
    return counts


@numba.njit(cache=True, nogil=True)
def _count(tokens: NDArray[Any], bounds: Ints, table: Ints) -> Ints:
    counts = np.zeros(len(bounds) - 1, dtype=np.int64)
    for d in range(len(counts)):
        for i in range(bounds[d], bounds[d + 1]):
            counts[d] += table[tokens[i], 0] >= 0
    return counts


@numba.njit(cache=True, nogil=True)
def _mix(value: Any) -> Any:
    mixed = np.uint64(value) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def transformed(
    raw: NDArray[Any], table: Ints, splits: int, fim: int, fim_tokens: Ints, key: Any
) -> Ints:
    """The document `raw` (bos … eos) with `splits` of its tokens split, and as FIM document.

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
