"""Tables of hash-routed layers: balanced under the frequencies of the corpus, at every topology."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.manifest import Manifest
from data.rows import Loader, token_frequencies
from tests.trainer.tiny import saved_tensors, train
from trainer.config import RunConfig, load_config

TABLE = "layers.0.ffn.gate.tid2eid"


def table_of(run: Path, step: int) -> Tensor:
    return saved_tensors(run / f"checkpoints/step-{step:08d}")[TABLE]


def largest_load(config: RunConfig, table: Tensor) -> float:
    """Of an expert over the mean, on the rows of the first steps."""
    loads = torch.zeros(config.model.n_routed_experts)
    loader = Loader(config.data, config.seed)
    for step in range(loader.num_steps):
        for batch in loader.at(step):
            for tokens, lengths in zip(batch.tokens, batch.lengths, strict=True):
                experts = table[tokens[: sum(lengths)]].flatten()
                loads += experts.bincount(minlength=len(loads))
    return float(loads.max() / loads.mean())


def test_a_run_s_table_is_balanced_by_the_counts_of_its_shards(
    tiny: Path, on_two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train(tiny, tmp_path / "run", "steps=3")
    assert "no counts" not in capsys.readouterr().out
    table = table_of(tmp_path / "run", 3)
    assert largest_load(config, table) < 1.02
    assert torch.equal(table, table_of(on_two_ranks / "moved", 3))

    shards = tmp_path / "shards"
    shutil.copytree(config.data.shards, shards)
    Manifest.load(shards).model_copy(update={"token_counts": None}).save(shards)
    other = train(tiny, tmp_path / "other", "steps=3", f"data.shards={shards}")
    assert f"{shards} has no counts of ids" in capsys.readouterr().out
    uncounted = table_of(tmp_path / "other", 3)
    assert largest_load(other, uncounted) > 1.05

    # A resume keeps the table of the checkpoint, whatever the shards have.
    train(tiny, tmp_path / "run", "steps=4", f"data.shards={shards}")
    assert "no counts" not in capsys.readouterr().out
    assert torch.equal(table_of(tmp_path / "run", 4), table)


def test_ids_that_the_tokenizer_lacks_have_rows_too(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, ["model.vocab_size=450"])
    assert token_frequencies(Loader(config.data, 0)).shape == (400,)  # type: ignore[union-attr]
    train(tiny, tmp_path, "model.vocab_size=450", "steps=1")
    rows = table_of(tmp_path, 1)[400:]
    assert len(rows) == 50 and len(rows.unique()) == config.model.n_routed_experts
