"""Signatures for deduplication: a hash of the text and MinHash values of its word n-grams.

Words are runs of letters and digits, ASCII in lower case; a character of a script without spaces
(from U+3000 on) is a word. The MinHash is rensa's. Everything is a function of the text alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.prepare.splits import document_hash

NEAR_SLOTS, NEAR_ROWS = 128, 8  # bands of 8: finds similarity above about (1/16)^(1/8) = 0.71
TEMPLATE_SLOTS, TEMPLATE_ROWS = 64, 4  # bands of 4: above about (1/16)^(1/4) = 0.5
_NEAR_WORDS, _TEMPLATE_WORDS = 5, 3
_SEED = 4

SIGNATURE = np.dtype(
    [
        ("reason", "u1"),
        ("exact", "<u8"),
        ("near", "<u4", (NEAR_SLOTS,)),
        ("template", "<u4", (TEMPLATE_SLOTS,)),
    ]
)


def signatures(texts: Sequence[str]) -> NDArray[Any]:
    """The SIGNATURE of each text, with reason 0."""
    records = np.zeros(len(texts), dtype=SIGNATURE)
    if not len(texts):
        return records
    records["exact"] = [document_hash(text) for text in texts]
    content, bounds = _joined(texts)
    records["near"] = _minhash(content, bounds, _NEAR_WORDS, False, NEAR_SLOTS)
    records["template"] = _minhash(content, bounds, _TEMPLATE_WORDS, True, TEMPLATE_SLOTS)
    return records


def word_grams(texts: Sequence[str], size: int) -> list[NDArray[np.uint64]]:
    """The hashes of each text's n-grams of `size` words; of a text with fewer, one of all."""
    if not texts:
        return []
    hashes, offsets = _shingles(*_joined(texts), size, False)
    return np.split(hashes, offsets[1:-1].astype(np.int64))


def _joined(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(the UTF-8 bytes of all texts, where each begins and the last ends)."""
    raw = [text.encode() for text in texts]
    content = np.frombuffer(b"".join(raw), dtype=np.uint8)
    return content, np.concatenate([[0], np.cumsum([len(text) for text in raw])])


def _minhash(
    content: NDArray[np.uint8], bounds: NDArray[np.int64], size: int, mask: bool, slots: int
) -> NDArray[np.uint32]:
    from rensa import RMinHash

    hashes, offsets = _shingles(content, bounds, size, mask)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets, num_perm=slots, seed=_SEED
    )
    return np.array(digests.to_rows(), dtype=np.uint32)


@compiled
def _mix(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def _shingles(
    content: NDArray[np.uint8], bounds: NDArray[np.int64], size: int, mask: bool
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(hashes of the n-grams of `size` words of all texts, index of each text's first hash).

    `mask` treats every run of digits as equal. A text with fewer words is a single n-gram.
    """
    hashes = np.empty(len(content) // 2 + len(bounds), dtype=np.uint64)
    offsets = np.zeros(len(bounds), dtype=np.uint64)
    words = np.empty(size, dtype=np.uint64)  # the most recent ones
    count = 0
    for t in range(len(bounds) - 1):
        total, place, stop = 0, bounds[t], bounds[t + 1]
        while place < stop:
            begin = place
            word = np.uint64(0)
            if content[place] >= _SINGLE:
                width = 3 if content[place] < 240 else 4
                while place < begin + width:
                    word = _mix(word + np.uint64(content[place]) + _STEP)
                    place += 1
            else:
                digits = False  # the previous byte is a digit
                while place < stop and content[place] < _SINGLE and _is_letter(content[place]):
                    byte = content[place]
                    is_digit = 48 <= byte <= 57
                    if not (mask and digits and is_digit):
                        byte = byte + 32 if 65 <= byte <= 90 else 48 if mask and is_digit else byte
                        word = _mix(word + np.uint64(byte) + _STEP)
                    digits = is_digit
                    place += 1
            if place == begin:
                place += 1
                continue
            words[total % size] = word
            total += 1
            if total >= size:
                hashes[count] = _gram(words, total, size)
                count += 1
        if 0 < total < size:
            hashes[count] = _gram(words, 0, total)
            count += 1
        offsets[t + 1] = count
    return hashes[:count], offsets


_SINGLE = 227  # lead byte of U+3000; from there on every character is a word
_STEP = np.uint64(0x9E3779B97F4A7C15)


@compiled
def _is_letter(byte: Any) -> Any:
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte == 95 or byte >= 128


@compiled
def _gram(words: NDArray[np.uint64], first: int, size: int) -> Any:
    gram = np.uint64(size)
    for j in range(size):
        gram = _mix(gram * np.uint64(31) + words[(first + j) % size])
    return gram
