"""Every shipped configuration is read, built on the meta device, and has the size it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import V4Model
from model.parameters import parameter_counts
from tests.model.tiny import tiny_config
from trainer.config import RunConfig, load_config

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("post/*.yaml")])


def shipped(name: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.yaml")


def test_all_are_here():
    names = ["debug", "flash", "nano", "sft", "pro", "recipe-demo", "recipe-long"]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse_and_build(path):
    config = load_config(path)
    with torch.device("meta"):
        model = V4Model(config.model)
    assert len(model.layers) == config.model.num_hidden_layers
    assert all(p.is_meta for p in model.parameters())
    assert config.model.layer_types[-1] == "csa"
    assert config.data.tokenizer.vocab_size == config.model.vocab_size
    assert config.model.mtp_loss_weight == 0.3
    assert config.model.balance_loss_weight == 1e-4


# The digits that the specification prints, in billions: without MTP, active, MTP.
PRINTED = {"flash": ("284.3", "13.3", "6.6"), "pro": ("1573", "48.8", "25.8")}


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_of_the_released_sizes(name):
    counts = parameter_counts(shipped(name).model)
    main, active, mtp = PRINTED[name]
    decimals = len(main.partition(".")[2])
    assert f"{counts.main / 1e9:.{decimals}f}" == main
    assert f"{counts.active / 1e9:.1f}" == active
    assert f"{counts.mtp / 1e9:.1f}" == mtp
    assert counts.total == counts.main + counts.mtp


def test_small_configurations_have_the_size_they_say():
    assert 9e6 < parameter_counts(shipped("debug").model).main < 13e6
    nano = parameter_counts(shipped("nano").model)
    assert 0.9e9 < nano.total < 1.1e9
    assert nano.active < 0.4e9


def test_nano_has_the_widths_of_flash():
    """Of what kernels see: heads, groups of heads and their outputs, index heads, rotation."""
    nano, flash = shipped("nano").model, shipped("flash").model
    for field in (
        *("head_dim", "qk_rope_head_dim", "o_lora_rank", "index_head_dim", "index_topk"),
        *("sliding_window", "csa_compress_ratio", "hca_compress_ratio", "rope_scaling", "hc_mult"),
        *("rope_theta", "compress_rope_theta", "max_position_embeddings", "num_hash_layers"),
    ):
        assert getattr(nano, field) == getattr(flash, field), field
    assert nano.num_attention_heads // nano.o_groups == flash.num_attention_heads // flash.o_groups


def test_counts_of_a_tiny_model_by_hand():
    """One window layer, learned router; every product of sizes is written out."""
    config = tiny_config(num_hidden_layers=1, layer_types=("window",), num_hash_layers=0)
    counts = parameter_counts(config)
    attention = 32 * 24 + 24 * 4 * 16 + 32 * 16 + (2 * 16 * 4 // 4) * (2 * 12) + (2 * 12) * 32
    hyper = 2 * 24 * 4 * 32
    expert, gate = 3 * 32 * 24, 8 * 32
    hyper_head = 4 * 4 * 32
    assert counts.active == attention + hyper + gate + (3 + 1) * expert + hyper_head + 97 * 32
    vectors = (32 + 32 + 24 + 16) + 4 + 2 * (24 + 3) + (4 + 1) + 32
    assert counts.main == counts.active + 5 * expert + 97 * 32 + vectors
    assert counts.mtp == (
        counts.main - 2 * 97 * 32  # a block of the same kind, norm and hyper head
        + 2 * 32 * 32  # e_proj, h_proj
        + 2 * 32  # enorm, hnorm
    )  # fmt: skip


def test_flash_and_pro_follow_the_recipe():
    for name, tokens, rows, rate in (("flash", 32e12, 18432, 2.7e-4), ("pro", 33e12, 23040, 2e-4)):
        config = shipped(name)
        assert (config.data.seq_len, config.data.global_batch_size) == (4096, rows)
        phases = config.recipe.phases
        assert 0 <= sum(phase.tokens for phase in phases) - tokens < rows * 4096
        assert {
            s.rows.global_batch_size * s.rows.seq_len for s in phases if s.attention != "warmup"
        } == {rows * 4096}
        lengths = [phase.rows.seq_len for phase in phases]
        assert list(dict.fromkeys(lengths)) == [4096, 16384, 65536, 1048576]
        kinds = [phase.attention for phase in phases]
        assert list(dict.fromkeys(kinds)) == ["dense", "warmup", "sparse"]
        dense = sum(phase.tokens for phase in phases if phase.attention == "dense")
        assert dense == pytest.approx(1e12 if name == "flash" else 2e12, rel=1e-3)
        assert config.optim.learning_rate == rate
        assert config.optim.schedule.warmup_steps == 2000
        assert config.optim.schedule.final_ratio == 0.1
        assert config.precision == "bf16"
        assert config.mtp_loss_weight_in_decay == 0.1


def test_layer_types_of_flash_and_pro():
    flash, pro = shipped("flash").model, shipped("pro").model
    assert [flash.layer_types.count(kind) for kind in ("window", "csa", "hca")] == [2, 21, 20]
    assert [pro.layer_types.count(kind) for kind in ("window", "csa", "hca")] == [0, 30, 31]
    for model, first in ((flash, "window"), (pro, "hca")):
        assert model.layer_types[:2] == (first, first)
        assert set(model.layer_types[2::2]) == {"csa"} and set(model.layer_types[3::2]) == {"hca"}
