"""Speed of packing and of the loader on made-up shards: documents and tokens per second, one core.

    python benchmarks/data_loader.py [--documents 200000] [--row-length 4096]

Lengths are log-normal with a mean of about 900 tokens. Also printed: fill and cut documents of best
fit beside concatenate-and-cut, and the time from nothing to the first batch of step 10^6.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from data.files import sha256_of
from data.indexed import indexed_module
from data.loader import Loader
from data.manifest import Manifest, Shard
from data.packing import concatenate, pack, pack_into, pieces_of


def lengths_of(documents: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.minimum(rng.lognormal(6.0, 1.3, documents).astype(np.int64) + 2, 1_000_000)


def packing(lengths: np.ndarray, row_length: int) -> None:
    """Documents per second, fill, and documents cut."""
    pack(lengths[:100], row_length)
    start = time.perf_counter()
    packed = pack(lengths, row_length)
    seconds = time.perf_counter() - start
    print(f"packing, rows of {row_length}: {len(lengths) / seconds:,.0f} documents/s")
    pieces = pieces_of(np.zeros_like(lengths), lengths, row_length)
    rows = int(-(-lengths.sum() // (0.9995 * row_length)))
    plain = concatenate(*pieces, row_length, -(-int(lengths.sum()) // row_length))
    print(f"  longer than a row {int((lengths > row_length).sum()):,} documents")
    for name, found in (
        ("best fit", packed),
        ("best fit, fixed rows", pack_into(*pieces, row_length, rows)),
        ("concatenate", plain),
    ):
        cut = int((np.bincount(found.document, minlength=len(lengths)) > 1).sum())
        fill = lengths.sum() / (len(found) * row_length)
        print(f"  {name:21} fill {fill:.4%}, cut {cut:,} documents")


def shards(folder: Path, lengths: np.ndarray) -> dict[str, object]:
    """Write random tokens as two sources, and a tokenizer file that only needs a hash."""
    module = indexed_module()
    rng = np.random.default_rng(1)
    (folder / "tokens").mkdir()
    (folder / "tokenizer.model").write_bytes(b"only its hash is read")
    made = []
    for name, mine in (("code", lengths[::2]), ("prose", lengths[1::2])):
        writer = module.IndexedDatasetBuilder(f"{folder}/tokens/{name}.bin", dtype=np.int32)
        for length in mine:
            writer.add_document(rng.integers(3, 120_000, length, dtype=np.int32), [int(length)])
        writer.finalize(f"{folder}/tokens/{name}.idx")
        count, total = len(mine), int(mine.sum())
        made.append(
            Shard(source=name, domain="prose", split="train", name=name, documents=count,
                  tokens=total, bytes=total)
        )  # fmt: skip
    Manifest(
        digest="benchmark", folder="tokens", vocab_size=129280, bos_id=0, eos_id=1, pad_id=2,
        tokenizer_hash=sha256_of(folder / "tokenizer.model"), empty_documents={},
        shards=tuple(made),
    ).save(folder)  # fmt: skip
    sources = [{"name": name, "paths": ["-"]} for name in ("code", "prose")]
    return {"sources": sources, "shards": str(folder), "tokenizer": {"path": str(folder)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    lengths = lengths_of(options.documents)
    packing(lengths, options.row_length)
    from data.config import DataConfig

    with tempfile.TemporaryDirectory() as name:
        sizes = {"row_length": options.row_length, "batch_rows": options.batch_rows}
        fields = shards(Path(name), lengths)
        config = DataConfig.model_validate(
            fields | sizes | {"weights": {"code": 0.4, "prose": 0.6}}
        )
        Loader(config, 0).at(0)  # compiles
        start = time.perf_counter()
        loader = Loader(config, 0)
        loader.at(10**6)
        print(f"first batch at step 10^6: {time.perf_counter() - start:.2f} s")
        tokens, start = 0, time.perf_counter()
        for step in range(10**6, 10**6 + options.steps):
            tokens += sum(sum(map(sum, batch.lengths)) for batch in loader.at(step))
        rate = tokens / (time.perf_counter() - start)
        print(f"loader without transforms: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
