"""Speed and memory of `prepare`; see benchmarks/data/__main__.py."""

import itertools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from data.config import DataConfig, FiltersConfig
from data.prepare import prepare
from data.prepare.corpus import Corpus, Document
from data.prepare.filters import REASONS, Rules
from data.prepare.signatures import signatures
from data.text import Tokenizer
from tests.megatron_shards import indexed_module

_MEGABYTES = 24  # of text for each way of preparing
_FILES = 4


def write_corpus(config: DataConfig, folder: Path, megabytes: float) -> float:
    """Writes documents of all sources, taken in turn, as JSON lines; returns megabytes."""
    texts = list(_documents(config, megabytes))
    for i in range(_FILES):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i::_FILES]]
        (folder / f"{i}.jsonl").write_text("".join(lines))
    return sum(len(text.encode()) for text in texts) / 1e6


def config_of(config: DataConfig, folder: Path, **fields: object) -> DataConfig:
    """The config that prepares the corpus in `folder` into a new folder."""
    update = {
        "sources": [{"name": "text", "paths": [str(folder / "*.jsonl")]}],
        "shards": tempfile.mkdtemp(dir=folder, prefix="shards-"),
    }
    return DataConfig.model_validate(config.model_dump() | update | fields)


def by_prepare(config: DataConfig, folder: Path, **fields: object) -> None:
    """Prepares with this project."""
    prepare(config_of(config, folder, **fields), progress=False)


def by_datasets(config: DataConfig, folder: Path) -> None:
    """Tokenises by `datasets.map` with the batch encoder and one process, into Arrow files."""
    import datasets

    tokenizer = Tokenizer(config.tokenizer.path)
    files = [str(file) for file in sorted(folder.glob("*.jsonl"))]
    cache = tempfile.mkdtemp(dir=folder)
    table = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    table.map(
        lambda batch: {"ids": tokenizer.encode_batch(batch["text"])},
        batched=True,
        remove_columns=table.column_names,
        load_from_cache_file=False,
    )


def by_megatron(config: DataConfig, folder: Path) -> None:
    """Tokenises one document at a time into megatron-core's IndexedDatasetBuilder.

    Follows the loop of Megatron-LM's tools/preprocess_data.py, which is not part of the package.
    """
    tokenizer = Tokenizer(config.tokenizer.path)
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


def by_datatrove(config: DataConfig, folder: Path) -> None:
    """Tokenises by datatrove's DocumentTokenizer in its local executor.

    The tokenizer is the same, as `v4 export` writes it. The reader is a loop over `json.loads`,
    since datatrove's own needs a package that is not installed here.
    """
    from datatrove.data import Document as Page
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    def read(_data: object, _rank: int, _world_size: int) -> Iterator[Page]:
        for file in sorted(folder.glob("*.jsonl")):
            with file.open() as stream:
                for number, line in enumerate(stream):
                    yield Page(text=json.loads(line)["text"], id=str(number))

    logger.remove()
    place = Path(tempfile.mkdtemp(dir=folder))
    Tokenizer(config.tokenizer.path).export_hf(place / "tokenizer", 1 << 20)
    LocalPipelineExecutor(
        [
            read,
            DocumentTokenizer(
                str(place / "tokens"),
                str(place / "tokenizer" / "tokenizer.json"),
                eos_token="<｜end▁of▁sentence｜>",
                shuffle_documents=False,
            ),
        ],
        logging_dir=str(place / "logs"),
    ).run()


def by_tokenizer(config: DataConfig, folder: Path) -> None:
    """Only tokenises texts that are in memory, in batches: the least that any way needs."""
    tokenizer = Tokenizer(config.tokenizer.path)
    for file in sorted(folder.glob("*.jsonl")):
        with file.open() as stream:
            texts = [json.loads(line)["text"] for line in stream]
        for start in range(0, len(texts), 500):
            tokenizer.encode_batch(texts[start : start + 500])


class Memory:
    """Peak private memory (RssAnon) and resident memory (RssAnon + RssFile), in bytes.

    Resident memory includes pages of mapped files, such as the signatures of the filters, which the
    kernel can reclaim at any time. A thread samples both 50 times a second.
    """

    def __init__(self) -> None:
        self.private = self.resident = 0
        threading.Thread(target=self._sample_forever, daemon=True).start()

    def _sample_forever(self) -> None:
        while True:
            self.sample()
            time.sleep(0.02)

    def sample(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {key: value for key, value in (line.split(":", 1) for line in lines)}
        private, mapped = (int(sizes[key].split()[0]) << 10 for key in ("RssAnon", "RssFile"))
        self.private = max(self.private, private)
        self.resident = max(self.resident, private + mapped)


def _run(work: Callable[[], None], cores: int, pipe: object) -> None:
    """Sends (CPU seconds of `work` without the imports, its peak memory) from a new process."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    indexed_module(), import_module("datasets"), import_module("datatrove.data")
    memory = Memory()
    begin = time.process_time()
    work()
    seconds = time.process_time() - begin
    memory.sample()
    pipe.send((seconds, memory.private, memory.resident))  # type: ignore[attr-defined]


def run(work: Callable[[], None], cores: int) -> tuple[float, int, int]:
    """(CPU seconds, peak private bytes, peak resident bytes) of `work` in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_run, args=(work, cores, sender))
    process.start()
    sender.close()
    result: tuple[float, int, int] = receiver.recv()
    process.join()
    return result


def side_by_side(config: DataConfig) -> None:
    """Prints megabytes per second of CPU time of each way, on one core."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(config, folder, _MEGABYTES)
        print(f"{size:.1f} MB of text, from {len(config.sources)} sources")
        one = partial(by_prepare, config, folder, prepare_workers=1)
        ways: list[tuple[str, Callable[[], None]]] = [
            ("prepare", one),
            ("datasets.map", partial(by_datasets, config, folder)),
            ("datatrove", partial(by_datatrove, config, folder)),
            ("Megatron's tool", partial(by_megatron, config, folder)),
            ("tokenizer alone", partial(by_tokenizer, config, folder)),
        ]
        speeds = []
        for way, work in ways:
            seconds, _, _ = run(work, 1)
            speeds.append(size / seconds)
            print(
                f"{way:18} {speeds[-1]:7.2f} MB/s, {speeds[-1] / speeds[0]:5.2f} of prepare",
                flush=True,
            )


def filters(config: DataConfig) -> None:
    """Prints megabytes/s of each filter on one core, and what it drops of every source."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:1]))
    tokenizer = Tokenizer(config.tokenizer.path)
    for source in config.sources:
        documents = list(itertools.islice(Corpus(source), 1500))
        texts = [document.text for document in documents]
        size = sum(len(text.encode()) for text in texts) / 1e6
        signatures(texts[:2])  # compiles
        Rules(FiltersConfig(), source).judge(Document("a text\n" * 200))  # imports
        cheap = Rules(FiltersConfig(quality_rules=()), source)
        rules = Rules(FiltersConfig(), source)
        works: dict[str, Callable[[], object]] = {
            "length, encoding, marks": partial(_judge_all, cheap, documents),
            "the same and quality": partial(_judge_all, rules, documents),
            "signatures": partial(signatures, texts),
            "tokenising, for comparison": partial(tokenizer.encode_batch, texts),
        }
        for what, work in works.items():
            begin = time.perf_counter()
            work()
            print(f"{source.name:5} {what:26} {size / (time.perf_counter() - begin):8.2f} MB/s")
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        update = {"shards": name, "filters": {}}
        manifest = prepare(DataConfig.model_validate(config.model_dump() | update), progress=False)
        seconds = time.perf_counter() - begin
    total = sum(shard.bytes for shard in manifest.shards)
    for source in config.sources:
        remaining = sum(shard.documents for shard in manifest.shards if shard.source == source.name)
        dropped = manifest.dropped[source.name]
        counts = ", ".join(f"{r} {dropped[r].documents}" for r in REASONS if r in dropped)
        total += sum(stats.bytes for stats in dropped.values())
        print(f"{source.name}: {remaining} documents kept; dropped: {counts}")
    print(f"prepare with all filters: {total / seconds / 1e6:.2f} MB/s on {os.cpu_count()} cores")


def _judge_all(rules: Rules, documents: list[Document]) -> None:
    for document in documents:
        rules.judge(document)


def _documents(config: DataConfig, megabytes: float) -> Iterator[str]:
    """Yields texts of all sources in turn, up to that size."""
    size = 0.0
    streams = [iter(Corpus(source)) for source in config.sources]
    for document in itertools.chain.from_iterable(zip(*streams, strict=False)):
        if size >= megabytes * 1e6:
            return
        size += len(document.text.encode())
        yield document.text


def _repeated(texts: list[str], folder: Path, megabytes: float) -> None:
    """Writes JSON lines of that size in files of 64 MB: the texts repeated, numbered to differ."""
    size, number, turn = 0, 0, 0
    while size < megabytes * 1e6:
        with (folder / f"{number:04d}.jsonl").open("w") as stream:
            part = 0
            while part < 64e6 and size < megabytes * 1e6:
                text = f"{turn} {texts[turn % len(texts)]}"
                part += stream.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                turn += 1
        number += 1


def memory(config: DataConfig) -> None:
    """Prints the memory of filtering and tokenising the same 10 MB, once and 100 times.

    The documents are the same, so that only the amount differs. Length, encoding and exact
    duplicates are filtered; near duplicates are not, since then nothing would remain.
    """
    filters = {"quality_rules": (), "near_duplicate_similarity": None, "template_similarity": None}
    texts = list(_documents(config, 10))
    for megabytes in (10, 1000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _repeated(texts, folder, megabytes)
            work = partial(by_prepare, config, folder, prepare_workers=1, filters=filters)
            seconds, private, resident = run(work, os.cpu_count() or 1)
            print(
                f"{megabytes:5} MB in {seconds:4.0f} s of CPU: peak private memory "
                f"{private >> 20} MiB, {resident >> 20} MiB with mapped files",
                flush=True,
            )
