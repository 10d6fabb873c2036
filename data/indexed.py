"""megatron-core's `.bin/.idx` files: opening them with checks, and the import that costs seconds.

A document is one sequence of tokens, [bos] + text + [eos].
"""

import os
import warnings
from pathlib import Path
from typing import Any

from data.errors import DataError


def indexed_module() -> Any:
    """megatron.core.datasets.indexed_dataset, without the warnings about GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def open_shard(prefix: Path, documents: int, tokens: int) -> Any:
    """The memory-mapped IndexedDataset at `prefix` (.bin and .idx).

    Raises DataError where a file is missing or its size is not that of `documents` sequences and
    `tokens` tokens.
    """
    module = indexed_module()
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(f"{prefix}{suffix}"):
            raise _damaged(f"{prefix}{suffix} is missing")
    try:
        dataset = module.IndexedDataset(str(prefix))
    except Exception as error:  # bare assertions, struct and numpy errors alike
        raise _damaged(f"{prefix}.idx is damaged") from error
    if len(dataset) != documents or int(dataset.sequence_lengths.sum()) != tokens:
        raise _damaged(f"{prefix}.idx does not hold {documents} documents of {tokens} tokens")
    expected = tokens * dataset.index.dtype_size
    actual = os.path.getsize(f"{prefix}.bin")
    if actual != expected:
        raise _damaged(f"{prefix}.bin has {actual} bytes instead of {expected}")
    return dataset


def _damaged(what: str) -> DataError:
    return DataError(f"{what}; make the shards again with `v4 data prepare CONFIG`.")
