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
from tests.optim.debug_parameters import FACTS, shapes

RATE = 0.02


def model(names: list[str] | None = None) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameters = {n: Parameter(torch.randn(s, generator=generator)) for n, s in shapes().items()}
    return {name: parameters[name] for name in names or parameters}


def optimizer(parameters: dict[str, Parameter], **muon: object) -> Optimizer:
    config = OptimConfig(muon=muon)
    table = build_table({n: tuple(p.shape) for n, p in parameters.items()}, FACTS, config)
    return Optimizer(parameters, table, config)


def give_gradients(parameters: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


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
    "hc_head.fn": lambda w: [w],
}


@pytest.mark.parametrize("batch_bytes", [1, 20_000, None])
def test_muon_against_a_reference(batch_bytes: int | None) -> None:
    parameters = model()
    start = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    ours = optimizer(parameters, max_batch_bytes=batch_bytes)
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
    ours = optimizer(model(), max_batch_bytes=20_000)
    actual = []
    batches = list(ours._batches(ours._muon))
    for batch in batches:
        shape = {tuple(sorted(piece.entry.matrices[1:])) for piece in batch}
        assert len(shape) == 1
        (rows, columns) = shape.pop()
        count = sum(piece.last - piece.first for piece in batch)
        assert count == 1 or count * rows * columns * 4 <= 20_000
        actual += [(p.entry.name, index) for p in batch for index in range(p.first, p.last)]
    expected = [(e.name, index) for e in ours._muon for index in range(e.matrices[0])]
    assert sorted(actual) == sorted(expected)
    assert len(batches) < len(expected) / 2


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
    parameters = model(names=["norm.weight", "hc_head.fn"])
    table = build_table({n: tuple(p.shape) for n, p in parameters.items()}, FACTS, OptimConfig())
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
    states = {
        key: t.clone() for key, t in ours.state_tensors().items() if key.endswith(tuple(frozen))
    }
    values = {name: parameters[name].detach().clone() for name in frozen}
    for name in frozen:
        parameters[name].grad = None
    ours.step(RATE)
    assert len(states) == 4
    assert all(torch.equal(ours.state_tensors()[key], tensor) for key, tensor in states.items())
    assert all(torch.equal(parameters[name].detach(), values[name]) for name in frozen)


def test_a_table_that_does_not_fit() -> None:
    parameters = model()
    config = OptimConfig()
    table = build_table(shapes(), FACTS, config)
    with pytest.raises(OptimError, match=r"not in both: hc_head\.fn"):
        Optimizer(parameters, table[1:], config)
    with pytest.raises(OptimError, match=r"twice.*hc_head\.fn"):
        Optimizer(parameters, [table[0], *table], config)
    with pytest.raises(OptimError, match=r"another shape.*norm\.weight"):
        Optimizer({**parameters, "norm.weight": Parameter(torch.zeros(3))}, table, config)
    low = Parameter(torch.zeros(shapes()["norm.weight"], dtype=torch.bfloat16))
    with pytest.raises(OptimError, match=r"not fp32: norm\.weight"):
        Optimizer({**parameters, "norm.weight": low}, table, config)


def test_gradients_may_lie_in_memory_in_another_order() -> None:
    """What torch's fused AdamW would not notice."""
    one, other = model(), model()
    for seed in range(2):
        give_gradients(one, seed)
        give_gradients(other, seed)
        for parameter in other.values():
            if parameter.dim() > 1:
                turned = parameter.grad.transpose(0, 1).contiguous().transpose(0, 1)
                assert torch.equal(turned, parameter.grad)
                parameter.grad = turned
        if seed == 0:
            ours, theirs = optimizer(one), optimizer(other)
        ours.step(RATE)
        theirs.step(RATE)
    assert not other["embed.weight"].grad.is_contiguous()
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name


def test_parameters_lie_in_order() -> None:
    parameters = {"embed.weight": Parameter(torch.zeros(5, 7).t())}
    with pytest.raises(OptimError, match=r"are not contiguous: embed\.weight"):
        optimizer(parameters)
