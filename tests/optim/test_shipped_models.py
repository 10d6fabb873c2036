"""The table over the real parameters of every shipped configuration, built on meta."""

from pathlib import Path

import pytest
import torch

from model import V4Model
from model.parameters import parameter_table
from optim import build_table
from trainer.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
LISTED_FOR_ADAMW = ("embed.", "head.weight", "norm", ".base", ".scale", "attn_sink", "ape")


@pytest.mark.parametrize("name", ["debug", "flash", "pro"])
def test_every_parameter_exactly_once(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    sizes = config.model
    with torch.device("meta"):
        model = V4Model(sizes)
    parameters = dict(model.named_parameters())
    table = build_table(
        {key: tuple(parameter.shape) for key, parameter in parameters.items()},
        parameter_table(sizes),
        config.optim,
    )
    assert [entry.name for entry in table] == list(parameters)
    for entry in table:
        on_adamw = any(word in entry.name for word in LISTED_FOR_ADAMW)
        assert entry.optimizer == ("adamw" if on_adamw else "muon"), entry.name
        if entry.matrices is not None:
            assert parameters[entry.name].view(entry.matrices).shape == entry.matrices
    stacks = {entry.name: entry.matrices for entry in table}
    width, experts, inner = sizes.hidden_size, sizes.n_routed_experts, sizes.moe_intermediate_size
    for index, kind in enumerate(sizes.layer_types):
        at = f"layers.{index}."
        assert stacks[f"{at}ffn.experts.w2"] == (experts, width, inner)
        assert stacks[f"{at}attn.wo_a.weight"][0] == sizes.o_groups
        if kind != "window":
            halves = 2 if kind == "csa" else 1
            assert stacks[f"{at}attn.compressor.wkv.weight"] == (halves, sizes.head_dim, width)
