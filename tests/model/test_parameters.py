"""Shapes without a model are those of the model."""

from pathlib import Path

import pytest
import torch

from model import V4Model
from model.parameters import parameter_shapes
from tests.model.tiny import tiny_config
from trainer.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["tiny", "no mtp", "flash.yaml", "pro.yaml"])
def test_shapes_are_those_of_the_model(name: str) -> None:
    if name.endswith(".yaml"):
        config = load_config(CONFIGS / name).model
    else:
        config = tiny_config(num_nextn_predict_layers=int(name == "tiny"))
    with torch.device("meta"):
        model = V4Model(config)
    assert parameter_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}
