"""The step against few-line references, and the state."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optim.config import OptimConfig
from optim.errors import OptimError
from optim.optimizer import Optimizer
from optim.partition import build_table
from tests.optim.debug_parameters import SIZES, shapes

RATE = 0.02


def model(
    dtype: torch.dtype = torch.float32, names: list[str] | None = None
) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, shape in shapes().items():
        value = torch.randn(shape, generator=generator)
        made[name] = Parameter(value.to(dtype if len(shape) > 1 else torch.float32))
    return {name: made[name] for name in names or made}


def optimizer(parameters: dict[str, Parameter], **muon: object) -> Optimizer:
    config = OptimConfig(muon=muon)
    table = build_table({n: tuple(p.shape) for n, p in parameters.items()}, SIZES, config)
    return Optimizer(parameters, table, config)


def give_gradients(parameters: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def reference_muon(blocks: list[Tensor], gradients: list[list[Tensor]], decay: float = 0.1) -> None:
    """`blocks`: the independent matrices, updated in place; one list of gradients per step."""
    for index, block in enumerate(blocks):
        momentum = torch.zeros_like(block)
        for step in gradients:
            momentum = 0.95 * momentum + step[index]
            update = orthogonal(step[index] + 0.95 * momentum)
            block.mul_(1 - RATE * decay).sub_(RATE * 0.18 * max(block.shape) ** 0.5 * update)


SPLITS = {  # how a human would cut the weight into its independent matrices
    "layers.0.attn.wkv.weight": lambda w: [w],
    "layers.0.attn.wo_b.weight": lambda w: [w],
    "layers.0.attn.wo_a.weight": lambda w: [w[:8], w[8:]],
    "layers.1.attn.compressor.wkv.weight": lambda w: [w[:16], w[16:]],
    "layers.1.attn.indexer.compressor.wgate.weight": lambda w: [w[:8], w[8:]],
    "layers.2.attn.compressor.wgate.weight": lambda w: [w],
    "layers.0.ffn.experts.w1": lambda w: [w[expert] for expert in range(6)],
    "layers.0.ffn.experts.w2": lambda w: [w[expert] for expert in range(6)],
    "hc_head_fn": lambda w: [w],
}


@pytest.mark.parametrize("batch_bytes", [1, 20_000, None])
def test_muon_against_a_reference(batch_bytes: int | None) -> None:
    parameters = model()
    start = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    ours = optimizer(parameters, batch_bytes=batch_bytes)
    gradients = []
    for seed in (5, 6, 7):
        give_gradients(parameters, seed)
        gradients.append({n: p.grad.double().clone() for n, p in parameters.items()})
        ours.step(RATE)
    for name, split in SPLITS.items():
        reference_muon(split(start[name]), [split(step[name]) for step in gradients])
        error = (parameters[name] - start[name]).abs().max().item()
        assert error < 2e-4, (name, error)


def test_batches_hold_every_matrix_once_and_stay_small() -> None:
    ours = optimizer(model(), batch_bytes=20_000)
    seen = []
    batches = list(ours._batches(ours._muon))
    for batch in batches:
        shape = {tuple(sorted(piece.entry.matrices[1:])) for piece in batch}
        assert len(shape) == 1
        (rows, columns) = shape.pop()
        count = sum(piece.last - piece.first for piece in batch)
        assert count == 1 or count * rows * columns * 4 <= 20_000
        seen += [(p.entry.name, index) for p in batch for index in range(p.first, p.last)]
    wanted = [(e.name, index) for e in ours._muon for index in range(e.matrices[0])]
    assert sorted(seen) == sorted(wanted)
    assert len(batches) < len(wanted) / 2


def test_queries_per_head_against_a_reference() -> None:
    name = "layers.0.attn.wq_b.weight"
    for choice, split in {"per_head": lambda w: list(w.split(16)), "whole": lambda w: [w]}.items():
        parameters = model(names=[name])
        start = parameters[name].detach().double().clone()
        give_gradients(parameters, 3)
        optimizer(parameters, query_matrices=choice).step(RATE)
        reference_muon(split(start), [split(parameters[name].grad.double())])
        assert (parameters[name] - start).abs().max() < 2e-4


def test_the_update_has_the_set_rms() -> None:
    parameters = model()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ours = optimizer(parameters, weight_decay=0.0)
    give_gradients(parameters, 2)
    ours.step(1.0)
    for entry in ours.table:
        if entry.matrices is not None:
            update = (parameters[entry.name] - before[entry.name]).view(entry.matrices)
            rms = update.square().mean(dim=(1, 2)).sqrt()
            torch.testing.assert_close(rms, torch.full_like(rms, 0.18), rtol=2e-3, atol=0)


def test_adamw_like_torch() -> None:
    parameters = model()
    ours = optimizer(parameters)
    names = [entry.name for entry in ours.table if entry.optimizer == "adamw"]
    copies = [Parameter(parameters[name].detach().clone()) for name in names]
    theirs = torch.optim.AdamW(copies, RATE, (0.9, 0.95), 1e-20, 0.1, foreach=False)
    for seed in (1, 2, 3):
        give_gradients(parameters, seed)
        for name, copy in zip(names, copies, strict=True):
            copy.grad = parameters[name].grad
        ours.step(RATE)
        theirs.step()
    for name, copy in zip(names, copies, strict=True):
        torch.testing.assert_close(parameters[name], copy, rtol=1e-6, atol=1e-7)


def test_zero_gradients_only_decay() -> None:
    parameters = model()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(parameters).step(RATE)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * RATE))


def test_the_decay_is_the_tables() -> None:
    parameters = model(names=["norm.weight", "hc_head_fn"])
    table = build_table({n: tuple(p.shape) for n, p in parameters.items()}, SIZES, OptimConfig())
    table = [replace(entry, weight_decay=0.5) for entry in table]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(parameters, table, OptimConfig()).step(RATE)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * RATE))


def test_a_missing_gradient_leaves_everything_alone() -> None:
    parameters = model()
    ours = optimizer(parameters)
    give_gradients(parameters, 1)
    ours.step(RATE)
    frozen = ["embed.weight", "layers.1.attn.indexer.wq_b.weight"]
    kept = {
        key: t.clone() for key, t in ours.state_tensors().items() if key.endswith(tuple(frozen))
    }
    values = {name: parameters[name].detach().clone() for name in frozen}
    for name in frozen:
        parameters[name].grad = None
    ours.step(RATE)
    assert len(kept) == 4
    assert all(torch.equal(ours.state_tensors()[key], tensor) for key, tensor in kept.items())
    assert all(torch.equal(parameters[name].detach(), values[name]) for name in frozen)


def test_masters_carry_steps_too_small_for_bf16() -> None:
    low, full = model(torch.bfloat16), model(torch.bfloat16)
    full = {name: Parameter(parameter.detach().float()) for name, parameter in full.items()}
    ours, exact = optimizer(low), optimizer(full)
    for seed in range(4):
        give_gradients(low, seed)
        for name, parameter in low.items():
            full[name].grad = parameter.grad.float()
        ours.step(1e-4)
        exact.step(1e-4)
    state = ours.state_tensors()
    for name, parameter in low.items():
        if parameter.dtype == torch.bfloat16:
            torch.testing.assert_close(
                state[f"master.{name}"], full[name].detach(), rtol=0, atol=1e-6
            )
            assert torch.equal(parameter, state[f"master.{name}"].bfloat16())
        else:
            assert f"master.{name}" not in state
            torch.testing.assert_close(parameter, full[name])


def test_fp32_gradients_of_bf16_parameters_stay_fp32() -> None:
    name = "embed.weight"
    results = []
    for scale in (1.0, 1.001):  # a difference that bf16 cannot hold
        parameters = model(torch.bfloat16, [name])
        parameters[name].grad_dtype = torch.float32
        ours = optimizer(parameters)
        for gradient in (1.0, scale):
            parameters[name].grad = torch.full(parameters[name].shape, gradient)
            ours.step(RATE)
        results.append(ours.state_tensors()[f"exp_avg.{name}"].clone())
    assert (results[1] > results[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_exact(dtype: torch.dtype) -> None:
    straight, stopped = model(dtype), model(dtype)
    one, two = optimizer(straight), optimizer(stopped)
    for seed in range(3):
        for parameters, ours in ((straight, one), (stopped, two)):
            give_gradients(parameters, seed)
            ours.step(RATE)
    saved = {key: tensor.clone() for key, tensor in two.state_tensors().items()}
    weights = {name: parameter.detach().clone() for name, parameter in stopped.items()}
    resumed = model(dtype)
    three = optimizer(resumed)
    for parameter in resumed.values():
        parameter.data.fill_(9.0)
    with torch.no_grad():
        for name, parameter in resumed.items():
            if parameter.dtype == torch.float32:
                parameter.copy_(weights[name])
    assert three.state_tensors().keys() == saved.keys()
    for key, tensor in three.state_tensors().items():
        tensor.copy_(saved[key])
    three.write_parameters()
    for seed in range(3, 5):
        for parameters, ours in ((straight, one), (resumed, three)):
            give_gradients(parameters, seed)
            ours.step(RATE)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    again = three.state_tensors()
    assert all(torch.equal(tensor, again[key]) for key, tensor in one.state_tensors().items())


def test_weights_loaded_later_reach_the_masters() -> None:
    parameters = model(torch.bfloat16, ["layers.0.attn.wkv.weight"])
    ours = optimizer(parameters)
    (parameter,) = parameters.values()
    parameter.data.fill_(0.5)
    ours.read_parameters()
    assert (ours.state_tensors()["master.layers.0.attn.wkv.weight"] == 0.5).all()


def test_a_table_that_does_not_fit() -> None:
    parameters = model()
    config = OptimConfig()
    table = build_table(shapes(), SIZES, config)
    with pytest.raises(OptimError, match=r"not in both: embed\.weight"):
        Optimizer(parameters, table[1:], config)
    with pytest.raises(OptimError, match=r"twice.*embed\.weight"):
        Optimizer(parameters, [table[0], *table], config)
    with pytest.raises(OptimError, match=r"another shape.*norm\.weight"):
        Optimizer({**parameters, "norm.weight": Parameter(torch.zeros(3))}, table, config)
