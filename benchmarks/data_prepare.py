"""Megabytes a second that become token shards, and what comes back from them.

    python -m benchmarks.data_prepare --tokenizer FOLDER [--megabytes 100] [--paths DIR ...]

The same JSON lines, made of Python sources, go three ways with the same tokenizer: `prepare` with
one process and with one a core, `datasets.map` (ids only) with one process, and a plain loop with
megatron-core's IndexedDatasetBuilder, a document at a time, as Megatron-LM's own preprocessing
does. Then every document is compared, token for token, with what the shards hold.
"""

import argparse
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.indexed import indexed_module, open_shard
from data.prepare import prepare
from data.splits import document_hash
from data.tokenizer import Tokenizer

_FILES = 8


def write_corpus(folder: Path, paths: list[str], megabytes: float) -> list[str]:
    """Put Python files up to `megabytes` of text into JSON lines; returns the texts."""
    texts: list[str] = []
    size = 0
    for file in sorted(file for path in paths for file in Path(path).rglob("*.py")):
        text = file.read_bytes().decode("utf-8", errors="ignore")
        if text.strip() and size < megabytes * 1e6:
            texts.append(text)
            size += len(text.encode())
    for i in range(_FILES):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i::_FILES]]
        (folder / f"{i}.jsonl").write_text("".join(lines))
    return texts


def config_of(folder: Path, tokenizer: str, workers: int) -> DataConfig:
    """Prepare what `write_corpus` wrote, into a folder of its own."""
    return DataConfig.model_validate(
        {
            "sources": [{"name": "code", "paths": [str(folder / "*.jsonl")]}],
            "tokenizer": {"path": tokenizer},
            "shards": tempfile.mkdtemp(dir=folder, prefix="shards-"),
            "row_length": 4096,
            "batch_rows": 1,
            "prepare_workers": workers,
        }
    )


def by_datasets(folder: Path, tokenizer: Tokenizer) -> None:
    """`datasets.map` with the batch encoder, one process."""
    import datasets

    files = [str(file) for file in sorted(folder.glob("*.jsonl"))]
    cache = str(folder / "cache")
    table = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    table.map(
        lambda batch: {"ids": tokenizer.encode_batch(batch["text"])},
        batched=True,
        remove_columns=table.column_names,
        load_from_cache_file=False,
    )


def by_megatron(folder: Path, tokenizer: Tokenizer) -> None:
    """A document at a time into IndexedDatasetBuilder, one process."""
    module = indexed_module()
    dtype = module.DType.optimal_dtype(tokenizer.vocab_size)
    builder = module.IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=dtype)
    for file in sorted(folder.glob("*.jsonl")):
        with file.open() as stream:
            for line in stream:
                ids = tokenizer.encode(json.loads(line)["text"])
                document = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=dtype)
                builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "megatron.idx"))


def differences(config: DataConfig, texts: list[str], tokenizer: Tokenizer) -> int:
    """Documents of the shards and of `texts` that have no partner, compared by their tokens."""
    manifest = prepare(config, progress=False)
    count: dict[int, int] = {}
    for shard in manifest.shards:
        path = Path(config.shards) / manifest.folder / shard.name
        for ids in open_shard(path, shard.documents, shard.tokens):
            key = document_hash(str(ids.tolist()))
            count[key] = count.get(key, 0) + 1
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        key = document_hash(str(ids))
        count[key] = count.get(key, 0) - 1
    return sum(map(abs, count.values()))


def main() -> None:
    """Print a line for each way, and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=float, default=100.0)
    packages = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    parser.add_argument("--paths", nargs="+", default=packages)
    options = parser.parse_args()
    tokenizer = Tokenizer(options.tokenizer)
    indexed_module(), import_module("datasets")  # their imports take seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(folder, options.paths, options.megabytes)
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"{len(texts)} documents, {size:.1f} MB of text, {os.cpu_count()} cores")
        one = config_of(folder, options.tokenizer, 1)
        all_cores = config_of(folder, options.tokenizer, os.cpu_count() or 1)
        ways: dict[str, Callable[[], object]] = {
            "prepare, 1 process": lambda: prepare(one, progress=False),
            "prepare, all cores": lambda: prepare(all_cores, progress=False),
            "datasets.map": lambda: by_datasets(folder, tokenizer),
            "megatron, per document": lambda: by_megatron(folder, tokenizer),
        }
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            print(f"{way:24} {size / (time.perf_counter() - begin):8.2f} MB/s", flush=True)
        print(f"documents lost, changed or twice: {differences(one, texts, tokenizer)}")


if __name__ == "__main__":
    main()
