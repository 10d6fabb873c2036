"""The table of documents: the same batches, no index read twice, missing shards known early."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.documents import PagedArray, open_tables
from data.errors import DataError
from data.manifest import Manifest
from data.rows.loader import Loader
from tests.data.rows.made_up import documents_of
from tests.data.rows.test_loader import changed, rows_of


def test_pages_of_an_array(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << 40, 40_000)
    (tmp_path / "x").write_bytes(b"head" + numbers.tobytes())
    with (tmp_path / "x").open("rb") as file:
        array = PagedArray(file, 4, numbers.dtype, len(numbers))
        for indices in (np.arange(0), np.array([39_999]), np.arange(8000, 9000)):
            assert (array.take(indices) == numbers[indices]).all()
        indices = np.random.default_rng(1).permutation(len(numbers))[:5000]
        assert (array.take(indices) == numbers[indices]).all()


@pytest.mark.parametrize("damage", ["another key", "cut", "no file"])
def test_a_table_of_other_documents_is_made_again(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "table.npy"
    documents_of(np.full(50_000, 7), "prose", file)
    lengths = np.full(50_000, 9)
    if damage == "another key":
        text = file.read_bytes()
        file.write_bytes(text.replace("key".encode("utf-32-le"), "old".encode("utf-32-le"), 1))
    else:
        file.write_bytes(file.read_bytes()[: -1000 if damage == "cut" else 0])
    table = documents_of(lengths, "prose", file).table
    assert table.longest == 9 and table.first_token(49_999) == 9 * 49_999
    again = documents_of(lengths, "prose", file).table  # from the file
    assert again.lengths.take(np.arange(3)).tolist() == [9, 9, 9]
    assert list(tmp_path.iterdir()) == [file]


def test_indexes_are_read_once_and_shards_when_needed(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.shards, tmp_path / "shards")
    made = changed(config, shards=str(tmp_path / "shards"))
    for table in tmp_path.rglob("documents-*.npy"):
        table.unlink()
    expected = [rows_of(Loader(made, 3).at(step)) for step in (0, 5)]

    def fail(*_: object) -> None:
        raise AssertionError("an index is read")

    monkeypatch.setattr("data.rows.shards.open_shard", fail)
    loader = Loader(made, 3)
    assert [rows_of(loader.at(step)) for step in (0, 5)] == expected


def test_many_shards_are_looked_for_in_a_thread(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.shards, tmp_path / "shards")
    made = changed(config, shards=str(tmp_path / "shards"))
    Loader(made, 3)
    manifest = Manifest.load(made.shards)
    (tmp_path / "shards" / manifest.folder / "text-train-00000.bin").unlink()
    monkeypatch.setattr("data.rows.shards._FEW", 0)
    loader = Loader(made, 3)
    loader._presence.begin()
    loader._presence._thread.join()
    with pytest.raises(DataError, match=r"text-train-00000\.bin does not exist; .*data prepare"):
        loader.at(0)


def test_without_a_folder_to_write_the_table_is_unnamed() -> None:
    source = documents_of(np.arange(2, 50), "prose", Path("/proc/none/table"))
    assert source.table.lengths.take(np.array([0, 47])).tolist() == [2, 49]
    assert not Path("/proc/none").exists()
    with pytest.raises(ZeroDivisionError):  # an error of a shard is the caller's
        open_tables(Path("/proc/none/x"), "", {"a": [source]}, lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
