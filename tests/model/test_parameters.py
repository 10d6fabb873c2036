"""The table of parameters is the model: a new parameter takes a module and one line of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig, V4Model, parameters
from model.execution import Execution
from model.hf import from_official, named_tensors, to_official, to_transformers
from model.moe import SharedExpert
from model.parameter_spec import ParameterSpec
from model.parameters import (
    memory_name,
    official_name,
    parameter_counts,
    parameter_shapes,
    parameter_table,
    spec_of,
    tensors_of,
)
from optim import OptimConfig, build_table
from optim.config import GROUPS
from tests.model.tiny import tiny_config
from trainer.checkpoint.logical_tensors import logical_tensors
from trainer.config import load_config
from trainer.parallel.degrees import Degrees
from trainer.parallel.placement import placement_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> V4Model:
    with torch.device("meta"):
        return V4Model(config, dtype)


def check_equal(config: ModelConfig) -> None:
    model = meta_model(config, torch.bfloat16)
    dtypes = {"weights": torch.bfloat16, "fp32": torch.float32, "int64": torch.int64}
    table = {line.name: (line.shape, dtypes[line.spec.dtype]) for line in tensors_of(config)}
    assert table == {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    trained = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_shapes(config) == trained
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())


def test_parameters_come_in_the_order_of_the_model():
    config = tiny_config()
    assert list(parameter_shapes(config)) == [n for n, _ in meta_model(config).named_parameters()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_table_has_names_shapes_and_dtypes_of_shipped_models(path):
    check_equal(load_config(path).model)


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 0}, {"hc_mult": 2}])
def test_and_of_other_models(changes):
    check_equal(tiny_config(**changes))


def test_groups_are_those_that_settings_name():
    assert {e.group for e in parameters.TABLE if e.group is not None} == set(GROUPS)


def test_every_name_has_one_official_name_and_comes_back():
    names = [line.name for line in tensors_of(tiny_config())]
    official = [official_name(name) for name in names]
    assert len(set(official)) == len(names)
    assert [memory_name(name) for name in official] == [(name, None) for name in names]
    assert official_name("mtp.0.hc_head.fn") == "mtp.0.hc_head_fn"
    assert memory_name("layers.2.ffn.experts.11.w3.weight") == ("layers.2.ffn.experts.w3", 11)
    assert memory_name("layers.2.ffn.experts.11.w4.weight")[1] is None


@pytest.mark.parametrize("name", ["norm2.weight", "layers.0.e_proj.weight", "layers.0.hc_attn_fn"])
def test_a_name_of_no_parameter_is_an_error(name):
    with pytest.raises(KeyError, match=name):
        spec_of(name)


class GatedSharedExpert(SharedExpert):
    """The shared expert with one more matrix."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, execution: Execution) -> None:
        super().__init__(config, dtype, execution)
        self.toy = nn.Module()
        size = config.moe_intermediate_size, config.hidden_size
        self.toy.side = nn.Parameter(torch.empty(size, dtype=dtype))


def test_adding_a_parameter_takes_its_module_and_one_line_of_the_table(monkeypatch):
    config = tiny_config()
    plain = parameter_counts(config)
    line = ParameterSpec(
        "ffn.shared_experts.toy.side",
        "shared_experts",
        lambda s: (s.F, s.D),
        "mlp.toy.weight",
        official="ffn.shared_experts.toy_side",
        sharded=("tensor", 0),
        matrices=lambda s: 2,
    )
    monkeypatch.setattr(parameters, "TABLE", (*parameters.TABLE, line))
    monkeypatch.setattr("model.moe.SharedExpert", GatedSharedExpert)
    check_equal(config)

    model = V4Model(config)
    model.init_weights(3)
    name, official = "layers.2.ffn.shared_experts.toy.side", "layers.2.ffn.shared_experts.toy_side"
    value = model.state_dict()[name]
    assert 0.8 < float(value.std()) / config.initializer_range < 1.2

    tensors: dict[str, Tensor] = dict(to_official(named_tensors(model).items()))
    assert torch.equal(tensors[official], value)
    assert torch.equal(from_official(tensors)[name], value)
    assert torch.equal(
        to_transformers(named_tensors(model))["model.layers.2.mlp.toy.weight"], value
    )
    assert official in logical_tensors(model, [])

    placement = placement_of(name, tuple(value.shape), Degrees(2, tensor=2), 1)
    assert (placement.global_offset, placement.local_shape) == ((12, 0), (12, 32))
    [assignment] = build_table({name: tuple(value.shape)}, parameter_table(config), OptimConfig())
    assert (assignment.optimizer, assignment.matrices) == ("muon", (2, 12, 32))
    blocks = config.num_hidden_layers
    assert parameter_counts(config).main == plain.main + blocks * value.numel()
    assert parameter_counts(config).active == plain.active + blocks * value.numel()
