"""The filter `contaminated`: documents that share n-grams of words with given texts.

Words are those of the signatures: letters and digits, ASCII in lower case; a character of a script
without spaces is one. N-grams are compared by 64-bit hashes: a document of w n-grams is dropped by
mistake with a probability of w·m / 2^64 for m n-grams of the texts, about 5e-10 for 1,000 and 10^7.

As datatrove's NGramsDecontFilter, with its index in memory; there a text of fewer words than an
n-gram is ignored, and here a document that has just its words is dropped.
"""

import re
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.config import SourceConfig
from data.errors import DataError
from data.filter_config import DecontaminationConfig
from data.prepare.corpus import Corpus
from data.prepare.find_files import SourceFile, find_files
from data.prepare.pieces import Piece
from data.prepare.readers import SUFFIXES
from data.prepare.signatures import word_grams

_NAME = "data.filters.decontamination"
_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
# A word in UTF-8, as `word_grams` finds it.
_WORD = re.compile(rb"[\xe3-\xef][\x80-\xbf]{2}|[\xf0-\xff][\x80-\xbf]{3}|[0-9A-Za-z_\x80-\xe2]+")


class Texts:
    """The n-grams of given texts.

    Raises DataError where a text cannot be read, or there is none with a word.
    """

    def __init__(self, config: DecontaminationConfig) -> None:
        self.config = config
        hashes: list[NDArray[np.uint64]] = []
        self.names: list[tuple[str, int]] = []  # file, and number of the text in it
        for file in files_of(config):
            texts = [document.text for document in _corpus(config, file).documents()]
            hashes += word_grams(texts, config.ngram_words)
            self.names += [(file.path.name, number) for number in range(1, len(texts) + 1)]
        counts = [len(grams) for grams in hashes]
        if not sum(counts):
            raise DataError(f"{_NAME}.paths name no text with a word.")
        size = 1 << (2 * sum(counts)).bit_length()
        self._keys = np.zeros(size, dtype=np.uint64)
        self._texts = np.zeros(size, dtype=np.int32)
        owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        _insert(self._keys, self._texts, np.concatenate(hashes), owners)

    def overlap(self, text: str) -> str | None:
        """What a document shares with the texts, if it is enough to drop it."""
        (grams,) = word_grams([text], self.config.ngram_words)
        count, first, owner = _matches(self._keys, self._texts, grams)
        if count < self.config.min_matches or count < self.config.min_fraction * len(grams):
            return None
        content = text.encode()
        words = list(islice(_WORD.finditer(content), first, first + self.config.ngram_words))
        shared = content[words[0].start() : words[-1].end()].decode()
        file, number = self.names[owner]
        return f"{count} of {len(grams):,} n-grams, text {number} of {file}: {shared!r}"


@lru_cache(maxsize=1)
def open_texts(config: DecontaminationConfig) -> Texts:
    """The n-grams of the texts that a config names."""
    return Texts(config)


def files_of(config: DecontaminationConfig) -> list[SourceFile]:
    """The files with the texts. Raises DataError for a path that matches nothing."""
    try:
        return find_files(_source(config, "json"))
    except DataError as error:
        raise DataError(f"{_NAME}: {str(error).split(': ', 1)[-1]}") from error


def _source(config: DecontaminationConfig, form: str) -> SourceConfig:
    fields = {"paths": config.paths, "include": config.include, "text_field": config.text_field}
    return SourceConfig.model_validate({"name": "decontamination", "format": form} | fields)


def _corpus(config: DecontaminationConfig, file: SourceFile) -> Corpus:
    path = file.path
    inner = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in SUFFIXES else path
    source = _source(config, _FORMATS.get(inner.suffix, "text"))
    return Corpus(source, [Piece(path=path, size=file.size)])


@compiled
def _slot(keys: NDArray[np.uint64], key: Any) -> Any:
    """Where a key is in an open-addressing table, or would be; 0 is an empty slot."""
    mask = np.uint64(len(keys) - 1)
    slot = (key ^ (key >> np.uint64(32))) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def _insert(
    keys: NDArray[np.uint64],
    texts: NDArray[np.int32],
    grams: NDArray[np.uint64],
    owners: NDArray[np.int32],
) -> None:
    for i in range(len(grams)):
        if grams[i] != 0:
            slot = _slot(keys, grams[i])
            if keys[slot] == 0:  # the first text with it
                keys[slot] = grams[i]
                texts[slot] = owners[i]


@compiled
def _matches(
    keys: NDArray[np.uint64], texts: NDArray[np.int32], grams: NDArray[np.uint64]
) -> tuple[int, int, int]:
    """(number of n-grams that are in the table, the first of them, its text)."""
    count, first, owner = 0, -1, -1
    for i in range(len(grams)):
        if grams[i] != 0:
            slot = _slot(keys, grams[i])
            if keys[slot] != 0:
                count += 1
                if first < 0:
                    first, owner = i, texts[slot]
    return count, first, owner
