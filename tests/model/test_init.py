"""Initial values: functions of (seed, name, expert), complete, and a good place to start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import IGNORE_INDEX, V4Model
from model.kernels.hyper_connection import write_streams
from tests.model.tiny import random_tokens, tiny_config


def initialised(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> V4Model:
    """Built as a trainer does: on meta, then empty, here full of NaN, then filled."""
    with torch.device("meta"):
        model = V4Model(tiny_config(**changes), dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights(seed)
    return model


def state(model: V4Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_nothing_is_left_uninitialised():
    for name, tensor in state(initialised(num_hash_layers=2)).items():
        assert tensor.isfinite().all(), name
        if not tensor.is_floating_point():
            assert tensor.min() >= 0, name


def test_every_matrix_has_the_configured_spread():
    for name, tensor in state(initialised(initializer_range=0.05)).items():
        if tensor.dim() < 2 or name.endswith(("ape", "tid2eid")):
            continue
        # A thousand normal numbers have a standard deviation within a tenth of theirs.
        assert 0.8 < float(tensor.std()) / 0.05 < 1.2, name
        assert abs(float(tensor.mean())) < 0.2 * 0.05, name


def test_norms_sinks_biases_and_factors():
    model = initialised()
    for name, tensor in state(model).items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith(("attn_sink", "ape", "gate.bias")):
            assert (tensor == 0).all(), name
        elif name.endswith(".scale"):
            assert tensor.tolist() == pytest.approx([0.01] * len(tensor)), name


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator_does():
    torch.manual_seed(1)
    first = state(initialised())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = state(initialised())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_numbers_everywhere():
    first, second = state(initialised(0)), state(initialised(1))
    for name, tensor in first.items():
        if tensor.dim() >= 2 and not name.endswith("ape"):
            assert not torch.equal(tensor, second[name]), name


def test_no_two_matrices_are_alike():
    starts: dict[tuple[float, ...], str] = {}
    for name, tensor in state(initialised()).items():
        if tensor.dim() == 3:
            parts = {f"{name}[{j}]": matrix for j, matrix in enumerate(tensor)}
        elif tensor.dim() == 2 and not name.endswith(("ape", "tid2eid")):
            parts = {name: tensor}
        else:
            continue
        for part, matrix in parts.items():
            start = tuple(matrix.flatten()[:8].tolist())
            assert start not in starts, f"{part} is {starts[start]}"
            starts[start] = part


def test_a_part_of_the_model_has_the_whole_s_numbers():
    """As on a pipeline stage or with a share of the experts: names decide, not what else exists."""
    whole = state(initialised())
    front = state(initialised(num_hidden_layers=2, layer_types=("window", "csa")))
    assert any(name.startswith("layers.1.") for name in front)
    for name, tensor in front.items():
        assert torch.equal(tensor, whole[name]), name
    few = state(initialised(n_routed_experts=5))
    for name in ("layers.2.ffn.experts.w1", "mtp.0.ffn.experts.w2"):
        assert few[name].shape[0] == 5 and torch.equal(few[name], whole[name][:5])


def test_every_expert_has_a_generator_of_its_own():
    """A generator's first numbers are the same however many follow: so is each expert's start."""
    whole, narrow = state(initialised()), state(initialised(moe_intermediate_size=16))
    for j in range(8):
        name = "layers.2.ffn.experts.w1"
        assert torch.equal(narrow[name][j], whole[name][j, :16]), j


def test_bf16_is_the_same_rounded_and_fp32_parameters_stay_fp32():
    whole, low = state(initialised()), state(initialised(dtype=torch.bfloat16))
    kinds = {tensor.dtype for tensor in low.values()}
    assert kinds == {torch.bfloat16, torch.float32, torch.int64}
    always = ("norm.weight", "attn_sink", "ape", ".fn", ".base", ".scale", "gate.bias")
    for name, tensor in low.items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name
        if tensor.is_floating_point():
            assert (tensor.dtype == torch.float32) == name.endswith(always), name


@pytest.mark.parametrize("name", ["hc_attn", "hc_ffn"])
def test_a_block_starts_close_to_a_plain_residual(name):
    """While streams are equal, x is their value and each stream becomes its value plus y."""
    model = initialised(initializer_range=0.006)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    y = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    for block in (*model.layers, *model.mtp):
        read = []

        def sublayer(given: Tensor, read: list[Tensor] = read) -> Tensor:
            read.append(given)
            return y

        streams = x[:, None].expand(-1, 4, -1).contiguous()
        x, post, comb = getattr(block, name).read(streams)
        out = write_streams(streams, sublayer(x), post, comb)
        torch.testing.assert_close(read[0], x, rtol=0, atol=0.02)
        torch.testing.assert_close(out, (x + y)[:, None].expand(-1, 4, -1), rtol=0, atol=0.02)


def test_each_stream_carries_mostly_itself_and_sublayers_read_in_turn():
    model = initialised(initializer_range=0.006)
    streams = torch.randn(50, 4, 32, generator=torch.Generator().manual_seed(0))
    turns = []
    for block in model.layers:
        for name in ("hc_attn", "hc_ffn"):
            read = []

            def sublayer(x: Tensor, read: list[Tensor] = read) -> Tensor:
                read.append(x)
                return torch.zeros_like(x)

            with torch.no_grad():
                x, post, comb = getattr(block, name).read(streams)
                out = write_streams(streams, sublayer(x), post, comb)
            for k in range(4):
                share = (out[:, k] * streams[:, k]).sum() / streams[:, k].square().sum()
                assert 0.9 < float(share) < 1.0
            shares = [
                (read[0] * streams[:, j]).sum() / streams[:, j].square().sum() for j in range(4)
            ]
            turns.append(max(range(4), key=lambda j, shares=shares: float(shares[j])))
    assert turns == [0, 1, 2, 3, 0, 1, 2, 3]


def spread_of_streams(model: V4Model, tokens: Tensor) -> float:
    """Relative distance of the streams after the last layer from their mean."""
    seen = []
    hook = model.layers[-1].register_forward_hook(lambda *args: seen.append(args[2][0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    mean = seen[0].mean(1, keepdim=True)
    return float((seen[0] - mean).norm() / mean.norm())


def test_streams_part_from_each_other_with_training():
    """Streams start as copies; equal gradients to all would keep them copies forever."""
    model = initialised(initializer_range=0.006)
    tokens = random_tokens(model.config, 2, 50)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    before = spread_of_streams(model, tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, targets=targets).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.endswith(("hc_attn.base", "hc_ffn.base")):
            post = parameter.grad[4:8]
            assert float((post - post.mean()).norm()) > 1e-5 * float(post.norm()) > 0, name
    assert before > 1e-5
    assert spread_of_streams(model, tokens) > 4 * before


def test_the_loss_starts_at_that_of_a_uniform_guess():
    model = initialised(initializer_range=0.006)
    tokens = random_tokens(model.config, 4, 60)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    output = model(tokens, targets=targets)
    uniform = float(torch.tensor(97.0).log())
    assert float(output.lm_loss) == pytest.approx(uniform, abs=0.02)
    assert float(output.mtp_loss) == pytest.approx(uniform, abs=0.02)
