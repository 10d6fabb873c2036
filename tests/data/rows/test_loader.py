"""A step's rows: pure, the same at every world size, every token predicted once."""

import itertools
import math
import multiprocessing
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.errors import DataError
from data.indexed import open_shard
from data.manifest import Manifest, Shard, Split
from data.prepare.run import prepare
from data.prepare.tokenizer_training import train_tokenizer
from data.rows.loader import Batch, Loader, unigram_entropy
from data.rows.prefetch import Prefetcher
from tests.data.kills import kill_after
from tests.megatron_shards import indexed_module

Row = tuple[list[int], list[int], list[int]]


def rows_of(batches: list[Batch]) -> list[Row]:
    return [
        (batch.tokens[b].tolist(), batch.targets[b].tolist(), batch.lengths[b])
        for batch in batches
        for b in range(len(batch.lengths))
    ]


def epoch_rows(loader: Loader) -> list[Row]:
    rows = [row for step in range(loader.num_steps) for row in rows_of(loader.at(step))]
    return rows[: loader.num_rows]


def documents_on_disk(config: DataConfig, split: Split) -> list[list[int]]:
    manifest = Manifest.load(config.shards)
    root = Path(config.shards) / manifest.folder
    shards = [open_shard(root / s.name, s.documents, s.tokens) for s in manifest.of_split(split)]
    return [ids.tolist() for shard in shards for ids in shard]


def test_shapes_and_padding(config: DataConfig) -> None:
    batches = Loader(config, seed=0).at(0)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 64)] * 6
    for tokens, targets, lengths in rows_of(batches):
        used = sum(lengths)
        assert 0 < used <= 64 and min(lengths) > 0
        assert set(tokens[used:]) <= {2} and set(targets[used:]) <= {-100}
        assert min(targets[:used]) >= 0
    assert all(batch.tokens.dtype == batch.targets.dtype == torch.int64 for batch in batches)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_token_is_predicted_once(config: DataConfig, split: Split) -> None:
    """Inputs are all tokens but each document's last, targets all but each first, in bigrams."""
    actual: Counter[tuple[int, int]] = Counter()
    loader = Loader(config, seed=3, split=split)
    for tokens, targets, lengths in epoch_rows(loader):
        start = 0
        for length in lengths:
            inputs = tokens[start : start + length]
            outputs = targets[start : start + length]
            assert inputs[1:] == outputs[:-1]
            actual.update(zip(inputs, outputs, strict=True))
            start += length
    expected: Counter[tuple[int, int]] = Counter()
    for ids in documents_on_disk(config, split):
        expected.update(itertools.pairwise(ids))
    assert actual == expected
    assert loader.num_targets == sum(expected.values())


def test_a_cut_document_continues_in_order(config: DataConfig) -> None:
    """The pieces of the longest document, found by content, tile it with one token of overlap."""
    longest = max(documents_on_disk(config, "train"), key=len)
    pieces = {tuple(longest[i : i + 65]) for i in range(0, len(longest) - 65, 64)}
    rows = epoch_rows(Loader(config, seed=0))
    full = {(*tokens, targets[-1]) for tokens, targets, lengths in rows if lengths == [64]}
    assert len(pieces) > 3 and pieces <= full


def test_at_is_pure(config: DataConfig) -> None:
    first, second = Loader(config, seed=5), Loader(config, seed=5)
    expected = [rows_of(first.at(step)) for step in range(6)]
    for step in (5, 0, 3, 3):
        assert rows_of(second.at(step)) == expected[step]
    far = 10**9  # no state is built up on the way there
    assert rows_of(first.at(far)) == rows_of(second.at(far))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_rows_in_order(config: DataConfig, world: int) -> None:
    alone = Loader(config, seed=1)
    ranks = [Loader(config, seed=1, rank=rank, world=world) for rank in range(world)]
    for step in (0, 7):
        together = [row for rank in ranks for row in rows_of(rank.at(step))]
        assert together == rows_of(alone.at(step))


def test_a_world_that_does_not_divide_gets_filler_rows(config: DataConfig) -> None:
    ranks = [Loader(config, seed=1, rank=rank, world=5) for rank in range(5)]
    shares = [rank.at(2) for rank in ranks]
    assert {tuple(tuple(batch.tokens.shape) for batch in share) for share in shares} == {
        ((2, 64), (1, 64))
    }
    rows = [row for share in shares for row in rows_of(share)]
    assert rows[:12] == rows_of(Loader(config, seed=1).at(2))
    assert rows[12:] == [([2] * 64, [-100] * 64, [])] * 3


def test_order_depends_on_seed_and_epoch(config: DataConfig) -> None:
    loader, other = Loader(config, seed=0), Loader(config, seed=1)
    assert rows_of(loader.at(0)) != rows_of(other.at(0))
    rows = [row for step in range(2 * loader.num_steps) for row in rows_of(loader.at(step))]
    first, second = rows[: loader.num_rows], rows[loader.num_rows : 2 * loader.num_rows]
    assert first != second
    assert tokens_in(first) == tokens_in(second)
    assert loader.epochs_of(0) == {"text": 0.0}
    assert loader.epochs_of(loader.num_rows) == {"text": config.global_batch_size}


def tokens_in(rows: list[Row]) -> Counter[int]:
    return Counter(target for _, targets, _ in rows for target in targets if target >= 0)


def test_validation_is_the_same_for_every_seed_and_ends(config: DataConfig) -> None:
    loader = Loader(config, seed=0, split="validation")
    other = Loader(config, seed=9, split="validation")
    assert epoch_rows(loader) == epoch_rows(other)
    last = [row for step in range(loader.num_steps) for row in rows_of(loader.at(step))]
    assert [row[2] for row in last[loader.num_rows :]] == [[]] * (len(last) - loader.num_rows)
    assert all(row[2] == [] for row in rows_of(loader.at(loader.num_steps)))
    transforms = {"fim_rate": 1.0, "fim_domains": ["prose"]}
    plain = Loader(changed(config, transforms=transforms), seed=0, split="validation")
    assert epoch_rows(plain) == epoch_rows(loader)


def test_unigram_entropy(config: DataConfig) -> None:
    assert unigram_entropy([torch.tensor([[5, 5, -100, 7, 7]])]) == pytest.approx(math.log(2))
    assert unigram_entropy([torch.tensor([9]), torch.tensor([1, 1, 1])]) == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    assert unigram_entropy([]) == 0.0
    loader = Loader(config, seed=0, rank=1, world=2, split="validation")
    counts = Counter(t for ids in documents_on_disk(config, "validation") for t in ids[1:])
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert loader.unigram_entropy() == pytest.approx(expected)
    batches = [b for r in (0, 1) for b in Loader(config, 0, r, 2, "validation").at(0)]
    assert loader.unigram_entropy(1) == pytest.approx(unigram_entropy(b.targets for b in batches))


def changed(config: DataConfig, **fields: object) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | fields)


def test_another_tokenizer_is_refused(config: DataConfig, tmp_path: Path) -> None:
    settings = config.tokenizer.model_dump() | {"path": str(tmp_path), "vocab_size": 900}
    other = changed(config, tokenizer=settings, shards=str(tmp_path / "shards"))
    shutil.copytree(config.shards, other.shards)
    with pytest.raises(DataError, match="no tokenizer at"):
        Loader(other, seed=0)
    train_tokenizer(other)
    with pytest.raises(DataError, match=r"made with another tokenizer than .*tokenizer\.model"):
        Loader(other, seed=0)
    prepare(other, progress=False, overwrite=True)
    assert Loader(other, seed=0).manifest.vocab_size == 900


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *itertools.product([".bin", ".idx"], ["truncated", "missing", "empty"]),
        *((".idx", "zeros"), (".idx", "another format")),
    ],
)
def test_damaged_shards(config: DataConfig, tmp_path: Path, suffix: str, damage: str) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(config.shards, copy)
    file = next(copy.rglob(f"*-train-00000{suffix}"))
    for table in copy.rglob("documents-*.npy") if damage in ("zeros", "another format") else ():
        table.unlink()  # which is made of the indexes, and checked against their sizes
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        damaged = {"truncated": content[:-3], "empty": b"", "zeros": bytes(len(content))}
        damaged["another format"] = b"X" + content[1:]
        file.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=rf"text-train-00000\{suffix} .*v4 data prepare"):
        Loader(changed(config, shards=str(copy)), seed=0)


def test_missing_shards_and_split(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Loader(changed(config, shards=str(tmp_path)), seed=0)
    manifest = Manifest.load(config.shards)
    shutil.copytree(config.shards, tmp_path, dirs_exist_ok=True)
    manifest.model_copy(update={"shards": tuple(manifest.of_split("train"))}).save(tmp_path)
    with pytest.raises(DataError, match="no document of the validation split"):
        Loader(changed(config, shards=str(tmp_path)), seed=0, split="validation")


def test_rank_outside_the_world(config: DataConfig) -> None:
    with pytest.raises(DataError, match="rank 2 is not one of 2 ranks"):
        Loader(config, seed=0, rank=2, world=2)


def _load(config: DataConfig) -> None:
    """Open the shards and go through their steps, some made ahead, until killed."""
    loader = Loader(config, seed=6)
    batches = Prefetcher(loader.at, ahead=2, steps=10**6)
    for step in itertools.count():
        batches.at(step)


def test_killed_ten_times_while_loading(config: DataConfig, tmp_path: Path) -> None:
    """The shards stay as they were, and the next run sees the rows of an undisturbed one."""
    splits = changed(config, transforms={"punctuation_split_rate": 0.5}, shards=str(tmp_path / "0"))
    shutil.copytree(config.shards, splits.shards)
    reference = first_steps(splits)
    original = {p.name: p.read_bytes() for p in Path(splits.shards).rglob("*") if p.is_file()}
    assert any(name.endswith(".splittable.npz") for name in original)
    rng = random.Random(5)
    killed_before_counts = 0
    for trial in range(10):
        copy = changed(splits, shards=str(tmp_path / f"killed{trial}"))
        shutil.copytree(config.shards, copy.shards)
        child = multiprocessing.get_context("fork").Process(target=_load, args=(copy,))
        child.start()
        kill_after(child, Path(copy.shards), "*/t*.npz", 1 + trial % 3, rng)  # one is there
        killed_before_counts += not list(Path(copy.shards).rglob("text-*.splittable.npz"))
        assert first_steps(copy) == reference
        left = [p for p in Path(copy.shards).rglob("*") if p.is_file()]
        assert {p.name: p.read_bytes() for p in left if not p.name.startswith(".")} == original
    assert killed_before_counts < 10


def first_steps(config: DataConfig) -> list[list[Row]]:
    loader = Loader(config, seed=6)
    return [rows_of(loader.at(step)) for step in range(4)]


def test_shards_of_version_0_1(config: DataConfig, tmp_path: Path) -> None:
    """Their manifests and file names say `heldout` for the validation split."""
    shutil.copytree(config.shards, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*/*-validation-*"):
        file.rename(file.with_name(file.name.replace("-validation-", "-heldout-")))
    for file in [tmp_path / "manifest.json", *tmp_path.glob("*/text-0*.json")]:
        text = file.read_text()
        assert "validation" in text
        file.write_text(text.replace("validation", "heldout"))
    old = changed(config, shards=str(tmp_path))
    for split in ("train", "validation"):
        assert epoch_rows(Loader(old, 0, split=split)) == epoch_rows(Loader(config, 0, split=split))
    before = (tmp_path / "manifest.json").read_text()
    assert [shard.split for shard in prepare(old, progress=False).shards] == ["train", "validation"]
    assert (tmp_path / "manifest.json").read_text() == before  # nothing to prepare again


def test_shards_that_megatron_made(config: DataConfig, tmp_path: Path) -> None:
    """By its own builder, in its widest type, without bos: a manifest is all they need."""
    (tmp_path / "theirs").mkdir()
    prefix = tmp_path / "theirs" / "gpt_text_document"
    documents = documents_on_disk(config, "train")[:40]
    builder = indexed_module().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(np.array(ids[1:]), [len(ids) - 1])
    builder.finalize(f"{prefix}.idx")
    tokens = sum(len(ids) - 1 for ids in documents)
    fields = {"source": "text", "domain": "prose", "split": "train", "name": prefix.name}
    shard = Shard(**fields, documents=40, tokens=tokens, bytes=tokens)
    manifest = Manifest.load(config.shards)
    manifest.model_copy(update={"folder": "theirs", "shards": (shard,)}).save(tmp_path)
    rows = epoch_rows(Loader(changed(config, shards=str(tmp_path)), seed=0))
    assert tokens_in(rows) == Counter(i for ids in documents for i in ids[2:])
