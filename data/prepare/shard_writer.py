"""Writes one `.bin/.idx` pair, and computes its hashes and counts while its bytes pass."""

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.files import fsync_file
from data.indexed import index_bytes, token_dtype
from data.manifest import Shard, Split
from data.prepare.work_item import WorkItem
from data.text import Tokenizer

_BUFFERED = 1 << 20  # tokens that are written and counted together


class ShardWriter:
    """The documents of a work item in one split; the files have temporary names until complete.

    Attributes:
        counts [V] int64: how often each id is an input: the eos of a document never is.
        lengths: tokens of each document.
    """

    def __init__(self, item: WorkItem, split: Split, folder: Path, tokenizer: Tokenizer) -> None:
        self.source, self.split = item.source, split
        self.prefix = folder / f"{item.source.name}-{split}-{item.number:05d}"
        self._partial = folder / f".{self.prefix.name}.{secrets.token_hex(8)}"
        self._bos, self._eos = tokenizer.bos_id, tokenizer.eos_id
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._file = open(f"{self._partial}.bin", "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._buffer: list[NDArray[np.int32]] = []
        self._buffered = self._bytes = 0
        self.lengths: list[int] = []
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)

    def add(self, ids: list[NDArray[np.int32]], size: int) -> None:
        """Appends one document of `size` UTF-8 bytes, between bos and eos."""
        ends = bool(ids) and ids[-1][-1:].tolist() == [self._eos]  # as conversations do
        end = [] if ends else [np.array([self._eos], dtype=np.int32)]
        document = [np.array([self._bos], dtype=np.int32), *ids, *end]
        self._buffer += document
        self.lengths.append(sum(map(len, document)))
        self._bytes += size
        self._buffered += self.lengths[-1]
        if self._buffered >= _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        """Writes, hashes and counts the documents in the buffer."""
        if not self._buffer:
            return
        ids = np.concatenate(self._buffer)
        self._buffer, self._buffered = [], 0
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.counts += np.bincount(ids, minlength=len(self.counts))

    def close(self) -> None:
        """Writes the last tokens."""
        self._flush()
        self._file.close()
        self.counts[self._eos] -= len(self.lengths)

    def discard(self) -> None:
        """Removes the incomplete files; safe to call when writing has failed."""
        with suppress(OSError):  # the disk is full; the file is removed anyway
            self._file.close()
        for suffix in (".bin", ".idx"):
            Path(f"{self._partial}{suffix}").unlink(missing_ok=True)

    def finish(self) -> Shard | None:
        """Writes the index, makes both files durable and renames them; None without documents."""
        if not self.lengths:
            self.discard()
            return None
        index = index_bytes(self.lengths, self._dtype)
        Path(f"{self._partial}.idx").write_bytes(index)
        for suffix in (".bin", ".idx"):
            fsync_file(Path(f"{self._partial}{suffix}"))
            os.replace(f"{self._partial}{suffix}", f"{self.prefix}{suffix}")
        return Shard(
            source=self.source.name,
            domain=self.source.domain,
            split=self.split,
            name=self.prefix.name,
            documents=len(self.lengths),
            tokens=sum(self.lengths),
            bytes=self._bytes,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
