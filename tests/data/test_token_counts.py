"""Counts of ids: those of the rows that training reads, by the mixture of the phases."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.manifest import Manifest
from data.prepare.run import prepare
from data.rows.frequencies import token_frequencies
from data.rows.loader import Loader
from data.token_counts import COUNTS_FILE


def changed(config: DataConfig, **fields: Any) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | fields)


def inputs_of(loader: Loader, steps: int) -> np.ndarray:
    """Occurrences of each id among the inputs of the first steps, [V]."""
    counts: Counter[int] = Counter()
    for step in range(steps):
        for batch in loader.at(step):
            for tokens, lengths in zip(batch.tokens.tolist(), batch.lengths, strict=True):
                counts.update(tokens[: sum(lengths)])
    return np.array([counts[i] for i in range(loader.manifest.vocab_size)])


def frequencies_of(config: DataConfig, phases: Sequence[DataPhase] = ()) -> np.ndarray:
    frequencies = token_frequencies(Loader(config, seed=1, phases=phases))
    assert frequencies is not None
    return frequencies


@pytest.fixture
def mixed(config: DataConfig, documents: list[str], tmp_path: Path) -> DataConfig:
    """Two sources of different text and size."""
    sources = []
    for name, texts in (("file", documents[:20]), ("short", documents[-150:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"name": name, "paths": [str(path)], "split": "train"})
    mixed = changed(config, sources=sources, shards=str(tmp_path / "shards"))
    prepare(mixed, progress=False)
    return mixed


def test_an_epoch_has_the_counted_frequencies(config: DataConfig) -> None:
    """It has every document once, and no transforms."""
    one = changed(config, global_batch_size=1, micro_batch_size=1, packing="concatenate")
    loader = Loader(one, seed=1)
    counted = inputs_of(loader, loader.num_rows)
    assert counted.sum() == loader.num_targets
    np.testing.assert_allclose(frequencies_of(one), counted / counted.sum(), rtol=1e-12, atol=0)


def test_phases_and_weights_decide_the_shares(mixed: DataConfig) -> None:
    def only(name: str) -> np.ndarray:
        weights = {source.name: float(source.name == name) for source in mixed.sources}
        return frequencies_of(changed(mixed, source_weights=weights))

    code, short = only("file"), only("short")
    assert np.abs(code - short).sum() > 0.5
    weighted = changed(mixed, source_weights={"file": 0.25, "short": 0.75})
    np.testing.assert_allclose(frequencies_of(weighted), 0.25 * code + 0.75 * short, rtol=1e-12)
    # 3 steps of 2 rows of 32 with 1:1, then 1 step of 4 rows of 16 with code alone: 3/4 and 1/4.
    phases = [
        DataPhase(seq_len=32, global_batch_size=2, steps=3, source_weights={"file": 1, "short": 1}),
        DataPhase(seq_len=16, global_batch_size=4, steps=1, source_weights={"file": 1}),
    ]
    expected = 0.75 * (code + short) / 2 + 0.25 * code
    np.testing.assert_allclose(frequencies_of(mixed, phases), expected, rtol=1e-12)


def test_shards_without_counts_get_them_when_they_are_prepared_again(mixed: DataConfig) -> None:
    """As those of earlier versions; nothing else about them changes."""
    counted, before = Manifest.load(mixed.shards), frequencies_of(mixed)
    file = Path(mixed.shards) / counted.folder / COUNTS_FILE
    content = file.read_bytes()
    counted.model_copy(update={"token_counts": None}).save(Path(mixed.shards))
    file.unlink()
    assert token_frequencies(Loader(mixed, seed=1)) is None
    assert prepare(mixed, progress=False) == counted
    assert file.read_bytes() == content
    np.testing.assert_array_equal(frequencies_of(mixed), before)


@pytest.mark.parametrize("damage", ["missing", "cut", "of others"])
def test_damaged_counts_are_refused_and_made_again(
    mixed: DataConfig, tmp_path: Path, damage: str
) -> None:
    file = Path(mixed.shards) / Manifest.load(mixed.shards).folder / COUNTS_FILE
    content = file.read_bytes()
    match damage:
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(content[:-9])
        case _:
            other = changed(mixed, sources=[mixed.sources[1]], shards=str(tmp_path / "other"))
            folder = prepare(other, progress=False).folder
            shutil.copy(tmp_path / "other" / folder / COUNTS_FILE, file)
    with pytest.raises(DataError, match=r"token_counts\.npz is missing or damaged"):
        token_frequencies(Loader(mixed, seed=1))
    prepare(mixed, progress=False)
    assert file.read_bytes() == content
