"""Parameters that are not trained: nothing of theirs changes, and nothing of the others differs."""

from pathlib import Path

import pytest
import torch

from data import Loader
from tests.distributed import spawn
from trainer.build import build_native
from trainer.config import load_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid

TRAINED = ".attn.wkv.weight"


def states_of(optimizer: object) -> dict[tuple[str, str, int], torch.Tensor]:
    return {(p.kind, p.name, p.start): p.tensor.clone() for p in optimizer.states()}  # type: ignore


def train_some(rank: int, world: int, path: Path) -> tuple[list[str], list[str], float]:
    """Worker: after a common step, a step of some weights only, and what that changed."""
    config = load_config(path)
    grid = Grid.build(config.degrees(world), torch.device("cpu"))
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    loader = Loader(config.data, config.seed, grid.data.rank, grid.data.size)
    engine.forward_backward(loader.at(0))
    engine.step(1e-3, engine.gradient_norm())
    parameters = dict(local.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name.endswith(TRAINED))
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    states = states_of(optimizer)
    engine.forward_backward(loader.at(1))
    norm = engine.gradient_norm()
    engine.step(1e-3, norm)
    new = states_of(optimizer)
    moved = [name for name, old in weights.items() if not torch.equal(old, parameters[name])]
    changed = sorted({key[1] for key, old in states.items() if not torch.equal(old, new[key])})
    assert all(p.grad is None for n, p in parameters.items() if not n.endswith(TRAINED))
    return moved, changed, float(norm)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_some_weights_leaves_the_others_alone(tiny: Path, precision: str) -> None:
    path = tiny.with_name(f"{precision}.yaml")
    path.write_text(f"base: {tiny.name}\nprecision: {precision}\n")
    alone = train_some(0, 1, path)
    expected = [f"layers.{row}{TRAINED}" for row in range(3)] + [f"mtp.0{TRAINED}"]
    assert alone[0] == expected and alone[1] == expected
    pair = spawn(train_some, 2, path)
    assert all(moved == expected for moved, _, _ in pair)
    assert sorted({name for _, changed, _ in pair for name in changed}) == expected
    for _, _, norm in pair:
        assert norm == pytest.approx(alone[2], rel=1e-5 if precision == "fp32" else 1e-2)
