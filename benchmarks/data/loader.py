"""Speed of packing and of the loader on one core; see benchmarks/data/__main__.py.

Synthetic lengths are log-normal with a mean of about 900 tokens.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.data.prepare import run
from data.config import DataConfig
from data.files import sha256_of
from data.manifest import Manifest, Shard
from data.rows.loader import Loader
from data.rows.packing import concatenate, pack, pack_into, pieces_of
from tests.megatron_shards import indexed_module

_STEPS = 60
WEIGHTS = {"code": 0.4, "docs": 0.35, "data": 0.25}


def lengths_of(documents: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.minimum(rng.lognormal(6.0, 1.3, documents).astype(np.int64) + 2, 1_000_000)


def packing(config: DataConfig) -> None:
    """Prints fill, cut documents and documents/s for the lengths of the shards."""
    sources = Loader(config, 0).sources
    lengths = np.concatenate([s.lengths_of(np.arange(s.documents)) for s in sources]) - 1
    pack(lengths[:100], 64)  # compiles
    print(f"{len(lengths):,} documents, {lengths.sum():,} tokens")
    for seq_len in (2048, 4096):
        pieces = pieces_of(np.zeros_like(lengths), lengths, seq_len)
        rows = int(-(-lengths.sum() // (config.packing_fill * seq_len)))
        longer = int((lengths > seq_len).sum())
        print(f"rows of {seq_len}: {longer:,} documents are longer than a row")
        for name, packed in (
            ("best fit", pack(lengths, seq_len)),
            ("best fit, fixed rows", pack_into(*pieces, seq_len, rows)),
            ("concatenate and cut", concatenate(*pieces, seq_len, rows)),
        ):
            cut = np.bincount(packed.document, minlength=len(lengths)) > 1
            short = int((cut & (lengths <= seq_len)).sum())
            used = len(np.unique(np.repeat(np.arange(len(packed)), np.diff(packed.offsets))))
            fill = lengths.sum() / (used * seq_len)
            print(f"  {name:21} fill {fill:.4%}, cut {int(cut.sum()):,}, {short:,} of them shorter")
    many = lengths_of(1_000_000)
    begin = time.perf_counter()
    pack(many, 4096)
    rate = len(many) / (time.perf_counter() - begin)
    print(f"a million synthetic lengths, rows of 4096: {rate:,.0f} documents/s on one core")


def shards(folder: Path, lengths: np.ndarray) -> dict[str, object]:
    """Writes random tokens as two sources, and a tokenizer file of which only the hash is read."""
    module = indexed_module()
    rng = np.random.default_rng(1)
    (folder / "tokens").mkdir()
    (folder / "tokenizer.model").write_bytes(b"only its hash is read")
    made = []
    for name, part in (("code", lengths[::2]), ("prose", lengths[1::2])):
        writer = module.IndexedDatasetBuilder(f"{folder}/tokens/{name}.bin", dtype=np.int32)
        for length in part:
            writer.add_document(rng.integers(3, 120_000, length, dtype=np.int32), [int(length)])
        writer.finalize(f"{folder}/tokens/{name}.idx")
        count, total = len(part), int(part.sum())
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


def _first_batch(config: DataConfig) -> None:
    Loader(config, 0).at(10**6)


def loader(config: DataConfig) -> None:
    """Prints tokens/s of one process, and the time to the first batch at a late step of a new one.

    The imports of the new process are not counted; loading compiled code is.
    """
    plain = {"transforms": {"fim_rate": 0.0}, "source_weights": {"code": 0.4, "prose": 0.6}}
    kinds = {
        "synthetic tokens, transforms off": plain,
        "real shards, transforms off": {"transforms": {"fim_rate": 0.0}},
        "real shards, FIM 0.1": {},
        "real shards, FIM 0.1 and splits 0.1": {"transforms": {"punctuation_split_rate": 0.1}},
        "the same with weights": {
            "transforms": {"punctuation_split_rate": 0.1},
            "source_weights": WEIGHTS,
        },
    }
    with tempfile.TemporaryDirectory() as name:
        made = shards(Path(name), lengths_of(200_000))
        for title, fields in kinds.items():
            base = config.model_dump() | (made if title.startswith("synthetic") else {})
            variant = DataConfig.model_validate(base | fields)
            opened = Loader(variant, 0)
            opened.at(10**6)  # compiles, and caches the counts of splits
            first, _, _ = run(partial(_first_batch, variant), 1)
            tokens, begin, cpu = 0, time.perf_counter(), time.process_time()
            for step in range(10**6, 10**6 + _STEPS):
                tokens += sum(sum(map(sum, batch.lengths)) for batch in opened.at(step))
            rate = tokens / (time.perf_counter() - begin)
            cpu_rate = tokens / (time.process_time() - cpu)
            print(
                f"{title:36} {rate / 1e6:6.1f}M tokens/s ({cpu_rate / 1e6:.1f}M by CPU time), "
                f"first batch at step 10^6 after {first:.2f} s",
                flush=True,
            )
