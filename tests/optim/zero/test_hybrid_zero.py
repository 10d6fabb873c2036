"""fp32 masters of parameters of lower precision, the order of sending, rounding, and errors."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from optim import OptimConfig, OptimError, build_table
from optim.zero import HybridZero, LocalParameter, ParameterGroup
from optim.zero.bucket import round_stochastically
from optim.zero.plan import plan_layout
from tests.optim.debug_parameters import FACTS, shapes

RATE = 0.02
Dtype = torch.dtype


class _Alone:
    rank, size = 0, 1


def group(
    parameters: dict[str, Parameter], local_parameters: list[LocalParameter]
) -> ParameterGroup:
    layout = plan_layout(local_parameters, 1, 1, OptimConfig().muon)
    return ParameterGroup(parameters, local_parameters, layout, _Alone(), _Alone())


def model(dtype: Dtype, names: list[str] | None = None) -> dict[str, Parameter]:
    """Parameters of a small model, its vectors in fp32."""
    generator = torch.Generator().manual_seed(1)
    parameters = {}
    for name, shape in shapes().items():
        value = torch.randn(shape, generator=generator)
        parameters[name] = Parameter(value.to(dtype if len(shape) > 1 else torch.float32))
    return {name: parameters[name] for name in names or parameters}


def alone(parameters: dict[str, Parameter]) -> HybridZero:
    """The optimizer of one rank, with a group for each precision."""
    table = build_table({n: tuple(p.shape) for n, p in parameters.items()}, FACTS, OptimConfig())
    groups = []
    for dtype in (torch.float32, torch.bfloat16):
        some = {n: p for n, p in parameters.items() if p.dtype == dtype}
        groups.append(group(some, [LocalParameter(e, e.shape) for e in table if e.name in some]))
    return HybridZero(groups, OptimConfig())


def step(ours: HybridZero, parameters: dict[str, Parameter], seed: int, rate: float = RATE) -> None:
    """One step with random fp32 gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    ours.reduce()
    ours.step(rate)


def states(ours: HybridZero) -> dict[str, torch.Tensor]:
    """Live states by kind and name; with one owner a parameter has one slice."""
    return {f"{state.kind}.{state.name}": state.tensor for state in ours.states()}


def test_the_norm_of_large_gradients_is_summed_exactly() -> None:
    parameters = {"embed.weight": Parameter(torch.zeros(5000, 200))}
    ours = alone(parameters)
    parameters["embed.weight"].grad = torch.full((5000, 200), 0.01)
    ours.reduce()
    exact = 1e6 * float(torch.tensor(0.01)) ** 2
    assert ours.squared_norm().item() == pytest.approx(exact, rel=1e-10)


def test_masters_carry_steps_too_small_for_bf16() -> None:
    low, full = model(torch.bfloat16), model(torch.bfloat16)
    full = {name: Parameter(parameter.detach().float()) for name, parameter in full.items()}
    ours, exact = alone(low), alone(full)
    for seed in range(4):
        step(ours, low, seed, 1e-4)
        step(exact, full, seed, 1e-4)
    state = states(ours)
    for name, parameter in low.items():
        if parameter.dtype == torch.bfloat16:
            master = state[f"master.{name}"].view(parameter.shape)
            assert torch.equal(master, full[name].detach()), name
            assert torch.equal(parameter, master.bfloat16()), name
        else:
            assert f"master.{name}" not in state
            assert torch.equal(parameter, full[name]), name
    assert not any(key.startswith("master.") for key in states(exact))


def test_fp32_gradients_of_bf16_parameters_stay_fp32() -> None:
    name = "embed.weight"
    results = []
    for scale in (1.0, 1.001):  # a difference that bf16 cannot hold
        parameters = model(torch.bfloat16, [name])
        ours = alone(parameters)
        parameters[name].grad_dtype = torch.float32
        parameters[name].grad = torch.full(parameters[name].shape, scale)
        ours.reduce()
        ours.step(RATE)
        results.append(states(ours)[f"exp_avg.{name}"].clone())
    assert (results[1] > results[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_exact(dtype: Dtype) -> None:
    straight, stopped, resumed = model(dtype), model(dtype), model(dtype)
    one, two, three = alone(straight), alone(stopped), alone(resumed)
    for seed in range(3):
        step(one, straight, seed)
        step(two, stopped, seed)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.fill_(9.0)
            if parameter.dtype == torch.float32:
                parameter.copy_(stopped[name])
    saved = states(two)
    assert states(three).keys() == saved.keys()
    for key, tensor in states(three).items():
        tensor.copy_(saved[key])
    three.restored()
    assert all(torch.equal(stopped[name], resumed[name]) for name in stopped)
    for seed in range(3, 5):
        step(one, straight, seed)
        step(three, resumed, seed)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    again = states(three)
    assert all(torch.equal(tensor, again[key]) for key, tensor in states(one).items())


def test_weights_loaded_later_reach_the_masters() -> None:
    name = "layers.0.attn.wkv.weight"
    parameters = model(torch.bfloat16, [name])
    ours = alone(parameters)
    parameters[name].data.fill_(0.5)
    ours.read_parameters()
    assert (states(ours)[f"master.{name}"] == 0.5).all()


def test_stochastic_rounding_has_no_bias() -> None:
    value = torch.tensor([1.0 + 2**-9, -3.3e-5, 1e20, 1.0])
    draws = torch.stack([round_stochastically(value, seed).double() for seed in range(4000)])
    step = value.abs().double() * 2**-7
    # The mean of n draws that are at most a step apart errs by step / (2 sqrt(n)).
    assert ((draws.mean(0) - value.double()).abs() <= 4 * step / (2 * 4000**0.5)).all()
    assert ((draws - value.double()).abs() <= step).all()
    assert len(draws[:, 0].unique()) == 2, "must go both ways"
    assert (draws[:, 3] == 1.0).all(), "what bf16 holds stays"
    nearest = (value.bfloat16().double() - value.double()).abs()
    assert nearest[0] > 4 * step[0] / (2 * 4000**0.5), "rounding to nearest would fail above"


def test_stochastic_rounding_keeps_what_is_not_finite() -> None:
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    odd = torch.cat([odd, torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)])
    rounded = round_stochastically(odd, 1)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf]
    assert rounded[2:].isnan().all()


def test_a_group_of_several_precisions_is_refused() -> None:
    names = {"norm.weight": (4,), "head.weight": (4, 4)}
    table = build_table(names, FACTS, OptimConfig())
    parameters = {
        "norm.weight": Parameter(torch.zeros(4)),
        "head.weight": Parameter(torch.zeros(4, 4, dtype=torch.bfloat16)),
    }
    local_parameters = [LocalParameter(entry, entry.shape) for entry in table]
    with pytest.raises(OptimError, match="several precisions"):
        HybridZero([group(parameters, local_parameters)], OptimConfig())
    with pytest.raises(OptimError, match=r"not in both: \['head.weight'\]"):
        HybridZero([group(parameters, local_parameters[:1])], OptimConfig())


class _Pair:
    """This rank and another one that sends the same; records the calls."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reduce_scatter(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.calls.append("scatter")
        return lambda: 2 * tensor[0]

    def all_gather(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([tensor, torch.zeros_like(tensor)])


def test_chunks_go_out_during_backward_in_one_order() -> None:
    """The last layer's first; a chunk that waits for a gradient holds up those after it."""
    names = {f"layers.{row}.attn.wkv.weight": (4, 8) for row in range(6)}
    table = build_table(names, FACTS, OptimConfig())
    parameters = {name: Parameter(torch.zeros(shape)) for name, shape in names.items()}
    local_parameters = [LocalParameter(entry, entry.shape) for entry in table]
    ranks = _Pair()
    layout = plan_layout(local_parameters, 2, 1, OptimConfig().muon)
    groups = [ParameterGroup(parameters, local_parameters, layout, ranks, _Alone())]
    ours = HybridZero(groups, OptimConfig(), chunk_elements=64)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ours.expect(dict.fromkeys(names, 2))

    def add(row: int) -> int:
        parameters[f"layers.{row}.attn.wkv.weight"].sum().backward()
        return len(ranks.calls)

    # Two matrices a chunk, two additions each: nothing goes out before the fourth.
    assert [add(row) for row in (5, 4, 5)] == [0, 0, 0] and add(4) == 1
    assert [add(row) for row in (1, 0, 1, 0)] == [1, 1, 1, 1], "2 and 3 are not there yet"
    assert [add(row) for row in (3, 2, 3)] == [1, 1, 1]
    assert add(2) == 3, "and then both"
    ours.reduce()
    assert len(ranks.calls) == 3
    gradients = list(ours.gradients())
    assert len(gradients) == 3
    assert all((state.tensor == 4.0).all() for state in gradients), "two additions on two ranks"


def test_chunks_may_end_within_a_parameter() -> None:
    """Sums reach their owner and weights return, wherever chunks are cut."""
    names = {f"layers.{row}.attn.wkv.weight": (4, 8) for row in range(4)} | {"norm.weight": (21,)}
    table = build_table(names, FACTS, OptimConfig())
    first, given = (
        {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
        for generator in (torch.Generator().manual_seed(seed) for seed in (0, 1))
    )
    parameters = {name: Parameter(value.clone()) for name, value in first.items()}
    local_parameters = [LocalParameter(entry, entry.shape) for entry in table]
    layout = plan_layout(local_parameters, 2, 1, OptimConfig().muon)
    groups = [ParameterGroup(parameters, local_parameters, layout, _Pair(), _Alone())]
    ours = HybridZero(groups, OptimConfig(), chunk_elements=26)  # 13 of each owner's elements
    for name, parameter in parameters.items():
        parameter.grad = given[name].clone()
    ours.reduce()
    flat = {name: torch.zeros(shape).flatten() for name, shape in names.items()}
    for state in ours.gradients():
        run = slice(state.start, state.start + state.tensor.numel())
        assert torch.equal(state.tensor.flatten(), 2 * given[state.name].flatten()[run])
        flat[state.name][run] = first[state.name].flatten()[run]
    ours.write_parameters()
    for name, parameter in parameters.items():  # the other owner sends zeros
        assert torch.equal(parameter.detach().flatten(), flat[name]), name
    assert any(bool(run.any()) and not bool(run.all()) for run in flat.values())


def test_fewer_gradients_than_expected_are_sent_by_reduce() -> None:
    ranks, name = _Pair(), "layers.0.attn.wkv.weight"
    table = build_table({name: (4, 8), "layers.0.attn.wo_b.weight": (8, 4)}, FACTS, OptimConfig())
    parameters = {entry.name: Parameter(torch.zeros(entry.shape)) for entry in table}
    local_parameters = [LocalParameter(entry, entry.shape) for entry in table]
    layout = plan_layout(local_parameters, 2, 1, OptimConfig().muon)
    ours = HybridZero(
        [ParameterGroup(parameters, local_parameters, layout, ranks, _Alone())], OptimConfig()
    )
    parameters[name].grad = torch.ones(4, 8)  # the other one is frozen
    ours.expect({name: 3})
    parameters[name].sum().backward()
    assert not ranks.calls
    ours.reduce()
    assert ranks.calls == ["scatter"]
    assert [(p.name, float(p.tensor.mean())) for p in ours.gradients()] in ([(name, 4.0)], [])
    before = {n: p.detach().clone() for n, p in parameters.items()}
    ours.step(0.1)
    assert torch.equal(parameters["layers.0.attn.wo_b.weight"], before["layers.0.attn.wo_b.weight"])
