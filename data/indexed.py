"""megatron-core's `.bin/.idx` files: checked opening, and the import, which takes seconds.

A document is one sequence of tokens, [bos] + text + [eos].
"""

import os
import struct
import warnings
from pathlib import Path
from typing import Any

from data.errors import DataError

# magic, version, code of the token type, number of sequences, number of document boundaries
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_BYTES_PER_SEQUENCE = 4 + 8  # length and offset
_BYTES_PER_BOUNDARY = 8


def indexed_module() -> Any:
    """megatron.core.datasets.indexed_dataset, without the warnings about GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def open_shard(prefix: Path, documents: int, tokens: int) -> Any:
    """The memory-mapped IndexedDataset at `prefix` (.bin and .idx).

    Raises DataError where a file is missing, cannot be read, or does not have the size and the
    header of `documents` sequences and `tokens` tokens in all. This is checked before megatron
    opens the files, since megatron only asserts, and its destructors then print to stderr.
    """
    module = indexed_module()
    try:
        with open(f"{prefix}.idx", "rb") as stream:
            header = stream.read(_HEADER.size)
        index_bytes = os.path.getsize(f"{prefix}.idx")
        token_bytes = os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise _damaged(f"{error.filename} cannot be read ({error.strerror})") from error
    boundaries = documents + 1
    expected = _HEADER.size + documents * _BYTES_PER_SEQUENCE + boundaries * _BYTES_PER_BOUNDARY
    if index_bytes != expected:
        raise _damaged(f"{prefix}.idx has {index_bytes} bytes instead of {expected}")
    magic, version, code, *counts = _HEADER.unpack(header)
    codes = {kind.value for kind in module.DType}
    if (magic, version, counts) != (module._INDEX_HEADER, _VERSION, [documents, boundaries]) or (
        code not in codes
    ):
        raise _damaged(f"{prefix}.idx does not begin like the index of {documents} documents")
    expected = tokens * module.DType.size(module.DType.dtype_from_code(code))
    if token_bytes != expected:
        raise _damaged(f"{prefix}.bin has {token_bytes} bytes instead of {expected}")
    dataset = module.IndexedDataset(str(prefix))
    if int(dataset.sequence_lengths.sum()) != tokens:
        raise _damaged(f"{prefix}.idx does not add up to {tokens} tokens")
    return dataset


def _damaged(what: str) -> DataError:
    return DataError(f"{what}; make the shards again with `v4 data prepare CONFIG`.")
