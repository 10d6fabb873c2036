"""Rotary embedding: YaRN against transformers, pairs against a loop, positions by layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV4Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from model import ModelConfig, SampleLayout
from model.kernels.norm import rotate
from model.positions import Positions
from model.rope import inverse_frequencies, layer_frequencies, rotation
from tests.model.tiny import YARN, tiny_config
from trainer.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = torch.device("cpu")


def shipped(name: str) -> ModelConfig:
    return load_config(CONFIGS / f"{name}.yaml").model


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(rope_scaling=YARN | {"factor": 2.5, "beta_fast": 5, "beta_slow": 0.5}),
        tiny_config(rope_scaling=YARN | {"original_max_position_embeddings": 8}),
        tiny_config(compress_rope_theta=50.0),
        shipped("debug"),
        shipped("flash"),
    ],
    ids=["tiny", "ramp", "short context", "small base", "debug", "flash"],
)
def test_yarn_equals_transformers(config):
    theirs = DeepseekV4Config(**config.to_hf())
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, CPU, layer_type="compress")
    assert factor == 1.0, "V4 folds no attention factor in"
    ours = layer_frequencies(config, compressed=True, device=CPU)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    plain = inverse_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, None)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "yarn",
    [
        YARN | {"original_max_position_embeddings": 1},
        YARN | {"original_max_position_embeddings": 4, "beta_fast": 64, "beta_slow": 8},
        YARN | {"beta_fast": 1, "beta_slow": 32},
        YARN | {"beta_fast": 2, "beta_slow": 2},
        YARN | {"original_max_position_embeddings": 10**9, "beta_fast": 1e-3, "beta_slow": 1e-4},
    ],
    ids=["below the first pair", "all below", "ends swapped", "ends equal", "past the last pair"],
)
@pytest.mark.parametrize("rotary_dim", [4, 8, 16])
def test_empty_correction_range_as_in_transformers(yarn, rotary_dim):
    """The ramp's end before its start, where no pair has a number of rotations between the two."""
    config = tiny_config(rope_scaling=yarn, qk_rope_head_dim=rotary_dim, compress_rope_theta=50.0)
    theirs = DeepseekV4Config(**config.to_hf())
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, CPU, layer_type="compress")
    ours = layer_frequencies(config, compressed=True, device=CPU)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_window_layers_have_no_yarn():
    for config in (tiny_config(), shipped("flash")):
        embedding = DeepseekV4RotaryEmbedding(DeepseekV4Config(**config.to_hf()))
        ours = layer_frequencies(config, compressed=False, device=CPU)
        torch.testing.assert_close(ours, embedding.main_inv_freq, rtol=1e-6, atol=0)
        by_hand = [
            config.rope_theta ** (-2 * j / config.qk_rope_head_dim) for j in range(len(ours))
        ]
        assert ours.tolist() == pytest.approx(by_hand, rel=1e-6)


def test_yarn_s_ends_by_hand():
    """Flash: the fastest pair keeps its step, the slowest has it divided by the factor of 16."""
    ours = layer_frequencies(shipped("flash"), compressed=True, device=CPU)
    assert ours[0] == 1.0
    assert float(ours[-1]) == pytest.approx(160000 ** (-62 / 64) / 16, rel=1e-5)


def test_adjacent_pairs_turn_and_the_rest_stays():
    x = torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(0))
    steps = inverse_frequencies(6, 100.0, None)
    position = torch.tensor([0, 1, 2, 7, 1000])
    out = rotate(x, rotation(position, steps))
    assert torch.equal(out[..., :4], x[..., :4]) and torch.equal(out[0], x[0])
    for row, t in enumerate(position.tolist()):
        for pair in range(3):
            angle = t * 100.0 ** (-2 * pair / 6)
            a, b = x[row, :, 4 + 2 * pair], x[row, :, 5 + 2 * pair]
            expected = [
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            ]
            pair_of_row = out[row, :, 4 + 2 * pair : 6 + 2 * pair]
            torch.testing.assert_close(pair_of_row, torch.stack(expected, -1), rtol=0, atol=1e-4)


def test_the_conjugate_turns_back_and_the_input_is_left_alone():
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    turn = rotation(torch.arange(9), inverse_frequencies(4, 100.0, None))
    back = rotate(rotate(x, turn), turn.conj())
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    assert torch.equal(x, before)


def test_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    steps = inverse_frequencies(8, 100.0, None)

    def product(m: int, n: int) -> float:
        turned = rotate(torch.stack([q, k]), rotation(torch.tensor([m, n]), steps))
        return float(turned[0] @ turned[1])

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_bf16_is_rotated_in_fp32():
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turn = rotation(torch.arange(9) * 1000, inverse_frequencies(8, 100.0, None))
    assert torch.equal(rotate(x, turn), rotate(x.float(), turn).bfloat16())


def test_positions_restart_with_each_sample_and_entries_stand_at_their_first_token():
    config = tiny_config()
    positions = Positions.of_microbatch(config, SampleLayout.from_lengths([[5, 37], [42]]))
    scaled = layer_frequencies(config, compressed=True, device=CPU)
    plain = layer_frequencies(config, compressed=False, device=CPU)
    place = torch.cat([torch.arange(5), torch.arange(37), torch.arange(42)])
    assert torch.equal(positions.rotation("window"), rotation(place, plain))
    for kind, ratio in (("csa", 4), ("hca", 16)):
        assert torch.equal(positions.rotation(kind), rotation(place, scaled))
        first = [i * ratio for n in (5, 37, 42) for i in range(n // ratio)]
        turned = rotation(torch.tensor(first), scaled)
        assert torch.equal(positions.windows(kind).rotation_Cr, turned)
