"""The same documents are kept under any limit of memory, order of tasks, and number of kills."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from data.config import FiltersConfig
from data.prepare.dedup import remove_dedup_files
from tests.data.prepare.dedup.made import expected, made_signatures, run_stages, write_items


def random_filters(rng: np.random.Generator) -> FiltersConfig:
    return FiltersConfig(
        exact_duplicates=rng.random() < 0.8,
        near_duplicate_similarity=rng.choice([None, 0.7, 0.8, 0.9], p=[0.1, 0.3, 0.3, 0.3]),
        template_similarity=rng.choice([None, 0.5, 0.6, 0.8], p=[0.1, 0.3, 0.3, 0.3]),
        template_min_documents=int(rng.integers(2, 12)),
    )


@pytest.mark.parametrize("seed", range(6))
def test_any_settings_give_the_reference(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 150))
    records = made_signatures(rng, count, max(1, count // 4))
    cuts = np.sort(rng.integers(0, count + 1, rng.integers(0, 9))).tolist()  # some are empty
    items = write_items(tmp_path, records, cuts)
    filters = random_filters(rng)
    verdicts = expected(records, cuts, filters)
    kinds = set()
    for memory in (64 * count, 400 * count, 1 << 30):
        stages = run_stages(tmp_path, items, filters, memory, rng)
        kinds |= {type(tasks[0]).__name__ for tasks in stages}
        for item, verdict in zip(items, verdicts, strict=True):
            stream = BytesIO()
            np.save(stream, verdict, allow_pickle=False)
            file = tmp_path / f"{item.name}.verdicts.npy"
            assert file.read_bytes() == stream.getvalue(), memory
            file.unlink()
        assert {path.name for path in (tmp_path / "dedup").iterdir()} == {
            "first.npy",
            "progress.json",
        }
        remove_dedup_files(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            f"{item.name}.filter.bin" for item in items
        }
