"""An exported model writes as its run does: attention and rounding are in config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.cache import CachedModel
from model.config import AttentionMode
from model.moe import Experts
from tests.trainer.tiny import train
from trainer.config import RunConfig
from trainer.export.export import export_run
from trainer.export.trained_with import KEY, read_trained_with
from trainer.generate.load import OpenedModel, open_model
from trainer.process.errors import ExportError

SIZES = ["model.hidden_size=32", "model.moe_intermediate_size=64", "model.index_head_dim=32"]
TOKENS = torch.arange(5, 55)  # more entries than `index_topk`


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    settings = ["steps=0", "phases=[{until_tokens: 192, attention: dense}]", "quantisation=mxfp4"]
    return train(tiny, tmp_path_factory.mktemp("trained") / "run", *settings, *SIZES)


def logits(opened: OpenedModel, attention: AttentionMode) -> Tensor:
    model = CachedModel(opened.model, 1, 64, attention=attention)
    return model.logits(model.forward(TOKENS, [len(TOKENS)]))


@pytest.mark.parametrize("weights", ["as_trained", "mxfp4_experts"])
def test_attention_and_rounding_are_those_of_the_run(
    run: RunConfig, tmp_path: Path, weights: str
) -> None:
    export_run(run, tmp_path / "hf", weights=weights)  # type: ignore[arg-type]
    opened, expected = open_model(tmp_path / "hf"), open_model(run.run_dir)
    assert opened.attention == expected.attention == "dense"
    assert opened.quantisation == expected.quantisation == "mxfp4"
    opened.model.float()  # packed weights are read in bf16
    stacks = [module for module in opened.model.modules() if isinstance(module, Experts)]
    with opened.rounding(), expected.rounding():
        assert all(experts.rounded is None for experts in stacks)  # no second copy
        assert torch.equal(logits(opened, opened.attention), logits(expected, expected.attention))
        assert not torch.equal(logits(opened, "select"), logits(opened, "dense"))
        rounded = logits(opened, "dense")
    assert not torch.equal(logits(opened, "dense"), rounded)


def test_packed_experts_do_not_mean_rounded_keys(
    tiny: Path, run: RunConfig, tmp_path: Path
) -> None:
    plain = train(tiny, tmp_path / "run", "steps=1", *SIZES)
    export_run(plain, tmp_path / "hf", weights="mxfp4_experts")
    trained_with, in_fp4 = read_trained_with(tmp_path / "hf")
    assert in_fp4 and trained_with.quantisation == "none"


def test_folders_of_others(tmp_path: Path) -> None:
    def read(**keys: object) -> tuple[str, str]:
        (tmp_path / "config.json").write_text(json.dumps(keys))
        result = read_trained_with(tmp_path)[0]
        return result.attention, result.quantisation

    assert read() == ("select", "none") and read(expert_dtype="fp4") == ("select", "mxfp4")
    with pytest.raises(ExportError, match=r"trained_with\.attention: Input should be 'select'"):
        read(**{KEY: {"attention": "all", "quantisation": "none"}})
