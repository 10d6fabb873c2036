"""Settings: numbers as YAML writes them, unknown keys, fields that contradict each other."""

import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from optim.config import OptimConfig

LATE = {"warmup_steps": 0, "decay_start": 9}


def test_defaults_are_the_report() -> None:
    config = OptimConfig()
    assert config.learning_rate == 2.7e-4
    assert config.clip_norm == 1.0
    assert (config.muon.momentum, config.muon.weight_decay, config.muon.update_rms) == (
        0.95,
        0.1,
        0.18,
    )
    assert (config.muon.coarse_steps, config.muon.fine_steps) == (8, 2)
    assert (config.adamw.betas, config.adamw.eps) == ((0.9, 0.95), 1e-20)
    assert config.adamw.weight_decay == 0.1


def test_numbers_that_yaml_reads_as_text() -> None:
    read = yaml.safe_load("{learning_rate: 1e-3, adamw: {eps: 1e-20}}")
    assert isinstance(read["adamw"]["eps"], str)  # why this test exists
    config = OptimConfig.model_validate(read)
    assert config.adamw.eps == 1e-20 and isinstance(config.adamw.eps, float)
    assert config.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"momentum": 0.9}, ["momentum"]),
        ({"muon": {"momentun": 0.9}}, ["momentun"]),
        ({"muon": {"momentum": 1.0}}, ["momentum"]),
        ({"learning_rate": 0}, ["learning_rate"]),
        ({"learning_rate": ".inf"}, ["learning_rate"]),
        ({"clip_norm": -1}, ["clip_norm"]),
        ({"schedule": {**LATE, "decay_fraction": 0.1}}, ["decay_start", "null"]),
        ({"schedule": {"decay_start": 9, "warmup_steps": 10}}, ["decay_start", "warmup_steps"]),
    ],
)
def test_bad_values_are_named(values: dict, named: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        OptimConfig.model_validate(values)
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("schedule", [{}, {"decay_start": 3000}, {"decay_fraction": 0.3}])
def test_a_resolved_config_is_a_config(schedule: dict) -> None:
    config = OptimConfig(schedule=schedule)
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert OptimConfig.model_validate(yaml.safe_load(text)) == config


def test_config_loads_without_torch() -> None:
    code = "import sys, optim.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
