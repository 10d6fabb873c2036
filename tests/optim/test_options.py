"""Muon's options, each against torch or a reference of a few lines."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import Parameter

from optim.config import GROUPS, MuonConfig, OptimConfig
from optim.muon import momentum_at, orthogonal_update
from optim.newton_schulz import Step, hybrid_steps, newton_schulz, polar_express_steps
from optim.optimizer import Optimizer
from optim.partition import build_table
from tests.optim.debug_parameters import FACTS, shapes
from trainer.config import ConfigError, load_config

RATE = 0.02


def matrix(rows: int, columns: int, decades: float) -> tuple[Tensor, Tensor]:
    """A matrix with singular values over so many decades, and its orthogonal factor; fp64."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator).double())[0]
    v = torch.linalg.qr(torch.randn(columns, rows, generator=generator).double())[0]
    return (u * torch.logspace(0, -decades, rows).double()) @ v.T, u @ v.T


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(32, 128), (128, 32)])
@pytest.mark.parametrize("steps", [hybrid_steps(), polar_express_steps(8)])
def test_every_iteration_ends_at_the_orthogonal_factor(
    steps: tuple[Step, ...], shape: tuple[int, int], gram: bool
) -> None:
    inputs, expected = matrix(min(shape), max(shape), 2.0)
    if shape[0] > shape[1]:
        inputs, expected = inputs.T, expected.T
    # 1e-3: where the polynomials themselves end in fp32
    result = newton_schulz(inputs.float(), steps, gram=gram).double()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    low = newton_schulz(inputs.float(), steps, torch.bfloat16, gram).double()
    values = torch.linalg.svdvals(low)  # bf16 has 8 bits: rounding of some 3 units in the last
    assert values.min() > 0.98 and values.max() < 1.02


@pytest.mark.parametrize("decades", [3.0, 4.0])
def test_gram_survives_small_singular_values_in_bf16(decades: float) -> None:
    inputs, _ = matrix(64, 256, decades)  # three steps without a restart diverge here
    result = newton_schulz(inputs.float(), dtype=torch.bfloat16, gram=True).double()
    assert torch.linalg.svdvals(result).max() < 1.02


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_gram_is_the_same_polynomial(count: int) -> None:
    inputs, _ = matrix(24, 96, 2.0)
    for steps in (hybrid_steps(count, 0), polar_express_steps(count)):
        direct = newton_schulz(inputs.float(), steps)
        # fp32 rounding, times what the coarse steps multiply it by
        torch.testing.assert_close(
            newton_schulz(inputs.float(), steps, gram=True), direct, rtol=0, atol=1e-4
        )


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("options", "steps", "dtype", "gram", "rms"),
    [
        ({}, hybrid_steps(8, 2), FP32, False, 0.18),  # on a CPU
        ({"coarse_steps": 3}, hybrid_steps(3, 2), FP32, False, 0.18),
        ({"fine_steps": 1}, hybrid_steps(8, 1), FP32, False, 0.18),
        ({"newton_schulz": "polar_express"}, polar_express_steps(8), FP32, False, 0.18),
        (
            {"newton_schulz": "polar_express", "polar_express_steps": 5},
            polar_express_steps(5),
            FP32,
            False,
            0.18,
        ),
        ({"gram": True}, hybrid_steps(8, 2), FP32, True, 0.18),
        ({"newton_schulz_precision": "bf16"}, hybrid_steps(8, 2), BF16, False, 0.18),
        ({"update_rms": 0.5}, hybrid_steps(8, 2), FP32, False, 0.5),
    ],
)
def test_the_update_is_made_as_the_options_say(
    options: dict, steps: tuple[Step, ...], dtype: torch.dtype, gram: bool, rms: float
) -> None:
    inputs = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(0))
    update = orthogonal_update(inputs, MuonConfig(**options))
    expected = newton_schulz(inputs, steps, dtype, gram).float() * (rms * 96**0.5)
    assert torch.equal(update, expected)
    assert torch.equal(update, orthogonal_update(inputs, MuonConfig())) == (not options)


def test_the_momentum_grows_in_a_line() -> None:
    config = MuonConfig(momentum_warmup_steps=10)
    momenta = [momentum_at(config, step) for step in (0, 5, 10, 11)]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momentum_at(MuonConfig(), 0) == 0.95


def model() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {n: Parameter(torch.randn(s, generator=generator)) for n, s in shapes().items()}


def optimizer(parameters: dict[str, Parameter], config: OptimConfig) -> Optimizer:
    return Optimizer(parameters, build_table(shapes(), FACTS, config), config)


def give_gradients(parameters: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_optimizer_warms_its_momentum_up() -> None:
    parameters = model()
    muon = MuonConfig(momentum_warmup_steps=2)
    ours = optimizer(parameters, OptimConfig(muon=muon))
    name = "layers.0.attn.wkv.weight"
    expected = torch.zeros_like(parameters[name])
    for step, mu in enumerate((0.85, 0.90, 0.95, 0.95)):
        give_gradients(parameters, step)
        expected = mu * expected + parameters[name].grad
        ours.step(RATE)
    torch.testing.assert_close(ours.state_tensors()[f"momentum.{name}"], expected)


def test_adamw_for_everything_with_factors_and_exclusions_like_torch() -> None:
    parameters = model()
    config = OptimConfig(
        matrix_optimizer="adamw",
        learning_rate_factors={"experts": 0.5, "embedding": 3.0},
        no_weight_decay=("norms", "experts"),
    )
    ours = optimizer(parameters, config)
    copies = {n: Parameter(p.detach().clone()) for n, p in parameters.items()}
    groups = []
    for name, copy in copies.items():
        expert, norm = ".experts." in name, "norm" in name
        factor = 0.5 if expert else 3.0 if name == "embed.weight" else 1.0
        decay = 0.0 if expert or norm else 0.1
        groups.append({"params": [copy], "lr": RATE * factor, "weight_decay": decay})
    theirs = torch.optim.AdamW(groups, RATE, (0.9, 0.95), 1e-20, foreach=False)
    for seed in (1, 2, 3):
        give_gradients(parameters, seed)
        for name, copy in copies.items():
            copy.grad = parameters[name].grad
        ours.step(RATE)
        theirs.step()
    for name, copy in copies.items():  # two orders of the same few fp32 operations
        torch.testing.assert_close(parameters[name], copy, rtol=1e-6, atol=1e-6)


def test_factors_and_exclusions_of_muon() -> None:
    plain, changed = model(), model()
    start = {name: parameter.detach().clone() for name, parameter in plain.items()}
    settings = OptimConfig(
        learning_rate_factors={"attention": 0.5, "router": 0.0}, no_weight_decay=("attention",)
    )
    for parameters, config in ((plain, OptimConfig()), (changed, settings)):
        give_gradients(parameters, 4)
        optimizer(parameters, config).step(RATE)
    name = "layers.0.attn.wo_b.weight"
    update = plain[name] - start[name] * (1 - 0.1 * RATE)
    torch.testing.assert_close(changed[name] - start[name], 0.5 * update, rtol=0, atol=1e-6)
    assert torch.equal(changed["layers.0.ffn.gate.weight"], start["layers.0.ffn.gate.weight"])
    assert torch.equal(changed["layers.0.ffn.experts.w1"], plain["layers.0.ffn.experts.w1"])


def test_every_group_has_parameters_and_every_parameter_one_group() -> None:
    names: list[str] = []
    for group in GROUPS:
        table = build_table(shapes(), FACTS, OptimConfig(learning_rate_factors={group: 2.0}))
        members = [entry.name for entry in table if entry.learning_rate_factor == 2.0]
        assert members, group
        names += members
    assert sorted(names) == sorted(shapes())


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optim.learning_rate_factors={expert: 2}", r"learning_rate_factors.*'expert'.*experts"),
        ("optim.no_weight_decay=[norm]", r"no_weight_decay.*'norm'.*norms"),
        ("optim.muon.qk_clip=100", r"optim\.muon\.qk_clip'.*normalises queries"),
    ],
)
def test_what_cannot_be_is_one_sentence(setting: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        load_config("configs/debug.yaml", [setting])
    assert "\n" not in str(caught.value)


def test_negative_factors_are_refused() -> None:
    with pytest.raises(ValidationError, match="experts"):
        OptimConfig(learning_rate_factors={"experts": -1.0})
