"""Shards of any origin: what Megatron's builder writes is read, or refused in one sentence."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.indexed import open_shard
from data.manifest import Manifest, Shard
from data.rows import Loader
from tests.megatron_shards import indexed_module

Document = Sequence[Sequence[int]]
"""The sequences of a document."""


def write(prefix: Path, documents: Sequence[Document], dtype: str = "uint16") -> None:
    """Writes documents with Megatron's builder."""
    builder = indexed_module().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for document in documents:
        ids = [i for sequence in document for i in sequence]
        builder.add_document(np.array(ids, dtype=dtype), [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")


def tokens_in(documents: Sequence[Document]) -> int:
    return sum(len(sequence) for document in documents for sequence in document)


def shards_of(config: DataConfig, folder: Path, documents: Sequence[Document]) -> DataConfig:
    """Shards of one source with these training documents, and `config` with them."""
    manifest = Manifest.load(config.shards)
    (folder / "f").mkdir(parents=True)
    write(folder / "f/x", documents)
    shard = Shard(
        source="text",
        domain="prose",
        split="train",
        name="x",
        documents=len(documents),
        tokens=tokens_in(documents),
        bytes=1,
    )
    update = {"folder": "f", "shards": (shard,), "token_counts": None, "settings": {}}
    manifest.model_copy(update=update).save(folder)
    settings = {"shards": str(folder), "seq_len": 8, "global_batch_size": 2, "micro_batch_size": 1}
    return DataConfig.model_validate(config.model_dump() | settings)


def pairs_of(loader: Loader) -> Counter[tuple[int, int]]:
    """(input, target) of every position of the epoch."""
    pairs: Counter[tuple[int, int]] = Counter()
    for step in range(loader.num_steps):
        for batch in loader.at(step):
            for row, lengths in enumerate(batch.lengths):
                end = sum(lengths)
                inputs, targets = batch.tokens[row, :end], batch.targets[row, :end]
                pairs.update(zip(inputs.tolist(), targets.tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_megatron_s_own_reader_agrees(tmp_path: Path, dtype: str) -> None:
    chance = np.random.default_rng(0)
    lengths = [*chance.integers(0, 9, 200).tolist(), 700, 0]
    documents = [[chance.integers(0, 100, n).tolist()] for n in lengths]
    write(tmp_path / "x", documents, dtype)
    opened = open_shard(tmp_path / "x", len(documents), tokens_in(documents), 100)
    theirs = indexed_module().IndexedDataset(str(tmp_path / "x"), mmap=False)
    assert len(opened) == len(theirs)
    for number, ids in enumerate(opened):
        assert ids.dtype == dtype and ids.tolist() == theirs[number].tolist()
        assert opened.read(number, 2, 5).tolist() == ids[2:5].tolist()
    for size in (1, 50, 10_000):
        blocks = list(opened.blocks(size))
        assert [end for _, end, _ in blocks][:-1] == [first for first, _, _ in blocks][1:]
        joined = np.concatenate([ids for _, _, ids in blocks])
        assert joined.tolist() == [i for (document,) in documents for i in document]


def test_several_sequences_are_one_document(tmp_path: Path) -> None:
    documents: list[Document] = [[[3, 4], [5]], [[6, 7, 8]], [], [[], [9], []], [[10], [11]]]
    write(tmp_path / "x", documents)
    opened = open_shard(tmp_path / "x", len(documents), tokens_in(documents))
    assert [ids.tolist() for ids in opened] == [[3, 4, 5], [6, 7, 8], [], [9], [10, 11]]


def test_empty_documents_and_single_tokens_are_no_positions(
    config: DataConfig, tmp_path: Path
) -> None:
    whole = [[0, 10 + i, 40 + i, 1] for i in range(20)]
    documents: list[Document] = [[[]], [[0]], *([ids] for ids in whole), [[]], [[0, 1]], [[]]]
    expected = Counter(pair for ids in whole for pair in pairwise(ids))
    expected[0, 1] += 1
    for packing in ("best_fit", "concatenate"):
        made = shards_of(config, tmp_path / packing, documents)
        loader = Loader(made.model_copy(update={"packing": packing}), seed=0)
        assert loader.num_targets == sum(expected.values())
        pairs = pairs_of(loader)
        assert pairs.keys() == expected.keys()
        assert pairs.total() >= expected.total()  # the last step continues with another epoch
        assert all(count >= expected[pair] for pair, count in pairs.items())


def test_shards_with_nothing_to_predict_are_refused(config: DataConfig, tmp_path: Path) -> None:
    nothing: list[list[Document]] = [[], [[[]]], [[[]], [[0]]]]
    for number, documents in enumerate(nothing):
        made = shards_of(config, tmp_path / str(number), documents)
        with pytest.raises(DataError, match="source 'text' hold no document of two tokens or more"):
            Loader(made, seed=0)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_an_id_beyond_the_vocabulary_is_named(
    config: DataConfig, tmp_path: Path, rate: float
) -> None:
    made = shards_of(config, tmp_path, [[[0, 5, 6, 1]], [[0, 5, 1024, 1]]])
    transforms = made.transforms.model_copy(update={"punctuation_split_rate": rate})
    with pytest.raises(DataError, match=r"x\.bin has the id 1024 .* the vocabulary of 1024"):
        Loader(made.model_copy(update={"transforms": transforms}), seed=0).at(0)


def test_a_file_that_is_truncated_while_it_is_read(config: DataConfig, tmp_path: Path) -> None:
    made = shards_of(config, tmp_path, [[[0, 10 + i, 1]] for i in range(50)])
    loader = Loader(made, seed=0)
    loader.at(0)
    os.truncate(tmp_path / "f/x.bin", 10)
    with pytest.raises(DataError, match=r"x\.bin has been truncated: it ends before document"):
        for step in range(10):
            loader.at(step)
    os.truncate(tmp_path / "f/x.idx", 0)  # no longer needed
    (tmp_path / "f/x.bin").unlink()
    with pytest.raises(DataError, match=r"x\.bin cannot be read: No such file"):
        loader.at(0)


def header_of(file: Path, at: int, value: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(value)] = value
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (17, b"\x07", "does not begin like the index"),  # float32
        (34, b"\xff\xff\xff\xff", "does not add up to 6 tokens"),  # a length of -1
        (42, b"\x04", "does not have its sequences one after another"),
        (66, b"\x05", "does not divide 2 sequences among its documents"),
    ],
)
def test_an_index_of_nonsense_is_refused(
    tmp_path: Path, at: int, value: bytes, message: str
) -> None:
    write(tmp_path / "x", [[[0, 5, 1]], [[0, 6, 1]]])
    header_of(tmp_path / "x.idx", at, value)
    with pytest.raises(DataError, match=message):
        open_shard(tmp_path / "x", 2, 6)


@pytest.mark.parametrize("damaged", ["all", "middle"])
def test_altered_tokens_of_the_same_size_are_refused(
    config: DataConfig, tmp_path: Path, damaged: str
) -> None:
    """At the start where all are zeros, as a crash of the host leaves them; else when read."""
    shutil.copytree(config.shards, tmp_path / "shards")
    made = config.model_copy(update={"shards": str(tmp_path / "shards")})
    manifest = Manifest.load(made.shards)
    shard = manifest.of_split("train")[0]
    prefix = tmp_path / "shards" / manifest.folder / shard.name
    opened = open_shard(prefix, shard.documents, shard.tokens, ends=manifest.document_ends)
    assert all(document[0] == 0 and document[-1] == 1 for document in opened)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    start = int(opened.lengths[:2].sum()) * opened.dtype.itemsize
    end = int(opened.lengths[:-1].sum()) * opened.dtype.itemsize
    start, end = (0, len(content)) if damaged == "all" else (start, end)
    content[start:end] = bytes(end - start)
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"\.bin has been altered: document \d+ does not begin"):
        loader = Loader(made, seed=1)
        assert damaged == "middle"
        list(loader)


def test_a_shard_that_is_listed_twice_is_refused(config: DataConfig, tmp_path: Path) -> None:
    manifest = Manifest.load(config.shards)
    shards = (*manifest.shards, manifest.shards[0].model_copy(update={"split": "validation"}))
    manifest.model_copy(update={"shards": shards}).save(tmp_path)
    with pytest.raises(DataError, match=r"damaged \(shards: text-train-00000 is there 2 times"):
        Manifest.load(tmp_path)
