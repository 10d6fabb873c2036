"""First batch at step 10^6 from 10^5 tiny shards, on a local disk and in object storage.

    python -m benchmarks.data.many_shards FOLDER [--shards 100000]

FOLDER gets shards of four documents of 300 random tokens, with the hashes of their files. Then new
processes open a loader of rows of 4096 tokens, 128 in a step, of which rank 0 of 16 reads 8, and
report the seconds from after their imports to its batch, and those of the process's CPU time. The
table of documents is there, as `v4 data prepare` leaves it. The same from moto's server on
loopback, which has the objects in its memory from the start: the first process fetches the table.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.data.objects import serve_folder
from data.config import DataConfig
from data.documents import open_tables, table_file
from data.files import sha256_of
from data.indexed import index_bytes, token_dtype
from data.manifest import Manifest, Shard
from data.storage import is_url

STEP = 10**6
_DOCUMENTS, _TOKENS = 4, 300
_VOCAB_SIZE = 32768


def make_shards(folder: Path, lengths: list[list[int]], vocab_size: int) -> None:
    """Writes shards of random tokens, and a tokenizer file of which only the hash is read.

    `lengths` are the tokens of each document of each shard.
    """
    rng = np.random.default_rng(0)
    digest = hashlib.sha256(b"made-up shards").hexdigest()
    (folder / digest[:16]).mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"only its hash is read")
    dtype = token_dtype(vocab_size)
    shards = []
    for number, of_shard in enumerate(lengths):
        name = f"text-train-{number:05d}"
        index, ends = index_bytes(of_shard, dtype), np.cumsum(of_shard)
        ids = rng.integers(3, vocab_size, ends[-1]).astype(dtype)
        ids[[0, *ends[:-1]]], ids[ends - 1] = 0, 1
        (folder / digest[:16] / f"{name}.bin").write_bytes(ids.tobytes())
        (folder / digest[:16] / f"{name}.idx").write_bytes(index)
        shards.append(
            Shard(
                source="text", domain="prose", split="train", name=name, documents=len(of_shard),
                tokens=ids.size, bytes=ids.size * 4,
                bin_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
                idx_sha256=hashlib.sha256(index).hexdigest(),
            )
        )  # fmt: skip
    Manifest(
        digest=digest, folder=digest[:16], vocab_size=vocab_size, bos_id=0, eos_id=1, pad_id=2,
        tokenizer_hash=sha256_of(folder / "tokenizer.model"), empty_documents={},
        shards=tuple(shards),
    ).save(folder)  # fmt: skip
    of_name = dict(zip((shard.name for shard in shards), lengths, strict=True))
    open_tables(
        table_file(folder / digest[:16], "train"),
        digest,
        {"text": shards},
        lambda shard: (dtype, np.array(of_name[shard.name])),
    )


def first_batch(shards: str, tokenizer: str, cache: str) -> None:
    """Prints the seconds from after the imports to the first batch; run in a new process."""
    began = time.perf_counter()
    from data.rows.loader import Loader

    if is_url(shards):
        import s3fs  # noqa: F401

    imported, cpu = time.perf_counter(), time.process_time()
    config = DataConfig.model_validate(
        {
            "sources": [{"name": "text", "paths": ["-"]}],
            "tokenizer": {"path": tokenizer, "vocab_size": _VOCAB_SIZE},
            "shards": shards,
            "cache": {"folder": cache},
            "seq_len": 4096,
            "global_batch_size": 128,
            "micro_batch_size": 8,
        }
    )
    loader = Loader(config, 0, 0, 16)
    opened = time.perf_counter()
    loader.at(STEP)
    ended = time.perf_counter()
    print(
        f"  {ended - imported:.2f} s ({opened - imported:.2f} s to open, {ended - opened:.2f} s "
        f"for the batch; CPU {time.process_time() - cpu:.2f} s), after imports of "
        f"{imported - began:.1f} s",
        flush=True,
    )


def _measure(shards: str, tokenizer: Path, cache: Path, label: str, runs: int) -> None:
    print(label, flush=True)
    for _ in range(runs):
        arguments = [shards, str(tokenizer), str(cache)]
        command = f"from benchmarks.data.many_shards import first_batch as f; f(*{arguments!r})"
        subprocess.run([sys.executable, "-c", command], check=True)


def main() -> int:
    """Prints the times of several processes on both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=100_000)
    options = parser.parse_args()
    folder: Path = options.folder / f"shards-{options.shards}"
    if not (folder / "manifest.json").exists():
        make_shards(folder, [[_TOKENS] * _DOCUMENTS] * options.shards, _VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary)
        _measure(str(folder), folder, cache, "local", 3)
        with serve_folder(folder, "shards") as url:
            _measure(url, folder, cache, "S3 on loopback, the first fetches the table", 3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
