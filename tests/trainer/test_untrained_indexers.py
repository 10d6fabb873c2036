"""Indexers of runs that do not train them: left as they are, and mentioned by exports."""

import json
import os
from pathlib import Path

import pytest
import torch

from model import V4Model
from tests.distributed import spawn
from tests.trainer.tiny import train
from trainer.config import RunConfig, load_config
from trainer.export.export import export_run, untrained_indexers
from trainer.export.import_run import open_run
from trainer.optimizer_table import table_of_run
from trainer.parallel.grid import Grid

PHASES = (
    "phases=[{until_tokens: 192, attention: dense}, {until_tokens: 384, attention: warmup}, "
    "{until_tokens: 576, attention: sparse}]"
)


def indexers_are_as_initialised(config: RunConfig) -> bool:
    """Asserts that all else was trained."""
    model = V4Model(config.model)
    model.init_weights(config.seed)
    local, _ = open_run(config.alone(), Grid.single())
    trained = dict(local.model.named_parameters())
    same = {name: torch.equal(p, trained[name]) for name, p in model.named_parameters()}
    indexers = [name for name in same if ".indexer." in name]
    assert len(indexers) > 3
    assert not any(same[name] for name in same if name.endswith("attn.wkv.weight"))
    return all(same[name] for name in indexers)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_without_phases_leaves_indexers_alone(
    tiny: Path, tmp_path: Path, optimizer: str
) -> None:
    config = train(tiny, tmp_path / "run", "steps=2", f"optim.matrix_optimizer={optimizer}")
    assert indexers_are_as_initialised(config)
    text = export_run(config, tmp_path / "hf")
    assert text.endswith("(attention = select), and transformers selects entries with them")


DEEPSPEED = [(0, "AdamW")]
DEEPSPEED += [(stage, kind) for kind in ("AdamW", "Muon") for stage in (1, 2, 3)]


def with_deepspeed(rank: int, world: int, path: Path, folder: Path) -> None:
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # DeepSpeed compiles its Muon, which takes minutes
    for stage, kind in DEEPSPEED:
        block = {"optimizer": {"type": kind}, "zero_optimization": {"stage": stage}}
        settings = ["steps=2", "engine=deepspeed", f"deepspeed={json.dumps(block)}"]
        settings += ["optim.matrix_optimizer=adamw"] * (kind == "AdamW")
        if kind == "Muon":  # the one that DeepSpeed has
            settings += ["optim.muon.coarse_steps=5", "optim.muon.fine_steps=0"]
            settings.append("optim.clip_norm=null")
        train(path, folder / f"{kind}-{stage}", *settings)


@pytest.mark.slow
def test_deepspeed_leaves_indexers_alone(tiny: Path, tmp_path: Path) -> None:
    """At every stage of ZeRO on two ranks."""
    spawn(with_deepspeed, 2, tiny, tmp_path, timeout=500)
    for stage, kind in DEEPSPEED:
        config = load_config(tmp_path / f"{kind}-{stage}" / "config.yaml")
        assert indexers_are_as_initialised(config), (stage, kind)


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
