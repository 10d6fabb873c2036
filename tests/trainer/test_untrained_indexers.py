"""Indexers of runs that do not train them: left as they are, and mentioned by exports."""

from pathlib import Path

import pytest
import torch

from model import V4Model
from tests.trainer.tiny import train
from trainer.config import load_config
from trainer.export.export import export_run, untrained_indexers
from trainer.export.import_run import open_run
from trainer.optimizer_table import table_of_run
from trainer.parallel.grid import Grid

PHASES = (
    "phases=[{until_tokens: 192, attention: dense}, {until_tokens: 384, attention: warmup}, "
    "{until_tokens: 576, attention: sparse}]"
)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_without_phases_leaves_indexers_alone(
    tiny: Path, tmp_path: Path, optimizer: str
) -> None:
    config = train(tiny, tmp_path / "run", "steps=2", f"optim.matrix_optimizer={optimizer}")
    model = V4Model(config.model)
    model.init_weights(config.seed)
    local, _ = open_run(config, Grid.single())
    trained = dict(local.model.named_parameters())
    same = {name: torch.equal(p, trained[name]) for name, p in model.named_parameters()}
    indexers = [name for name in same if ".indexer." in name]
    assert len(indexers) > 3 and all(same[name] for name in indexers)
    assert not any(same[name] for name in same if name.endswith("attn.wkv.weight"))
    text = export_run(config, tmp_path / "hf")
    assert text.endswith("(attention = select), and transformers selects entries with them")


def test_with_phases_the_table_is_the_config_s(tiny: Path) -> None:
    shapes = {"layers.1.attn.indexer.wq_b.weight": (16, 12)}
    decays = [
        table_of_run(load_config(tiny, overrides), shapes)[0].weight_decay
        for overrides in ([], ["steps=0", PHASES])
    ]
    assert decays == [0.0, 0.1]


def test_exports_mention_indexers_until_these_have_learnt(tiny: Path) -> None:
    config = load_config(tiny, ["steps=0", PHASES])
    assert "has not trained its indexers (attention = dense)" in untrained_indexers(config, 1)
    assert untrained_indexers(config, 2) == untrained_indexers(config, 3) == ""
