"""config.json of others: the official form, transformers' own, and what servers read of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from model import ModelConfig, ModelConfigError
from tests import servers
from tests.model.tiny import tiny_config
from trainer.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> ModelConfig:
    return load_config(CONFIGS / f"{name}.yaml").model


def official_flash() -> dict[str, Any]:
    """Keys and form of the released config.json, without quantisation."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 43,
        "num_hash_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        # One entry more than there are layers: the MTP block's.
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-06,
        "rms_norm_eps": 1e-06,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 129280,
    }


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def former_form(config: ModelConfig) -> dict[str, Any]:
    """The form of exports before 2026-12, in transformers' own field names."""
    names = {"csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
    kinds = {"window": "sliding_attention"} | names
    share = config.qk_rope_head_dim / config.head_dim
    main = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": share}
    compress = main | {"rope_theta": config.compress_rope_theta}
    if config.rope_scaling is not None:
        yarn = config.rope_scaling.model_dump()
        compress |= {"rope_type": "yarn", "attention_factor": 1.0} | yarn
    hashed = config.num_hash_layers
    official = ("num_hash_layers", "compress_ratios", "rope_scaling", "topk_method", "use_cache")
    return without(config.to_hf(), *official) | {
        "layer_types": [kinds[kind] for kind in config.layer_types],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (config.num_hidden_layers - hashed),
        "compress_rates": {names[k]: config.compress_ratio(k) for k in ("csa", "hca")},
        "partial_rotary_factor": share,
        "rope_parameters": {"main": main, "compress": compress},
        "mlp_bias": False,
        "pad_token_id": config.pad_token_id,
        "dtype": "bfloat16",
    }


class TestConfig:
    @pytest.mark.parametrize("name", ["debug", "nano", "flash", "pro"])
    def test_round_trip_of_the_shipped_ones(self, name):
        config = shipped(name)
        assert ModelConfig.from_hf(config.to_hf()) == config

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_scaling": None},
            {"num_hash_layers": 0},
            {"num_hash_layers": 4, "num_nextn_predict_layers": 0},
            {"csa_compress_ratio": 8, "hca_compress_ratio": 32},
            {"qk_rope_head_dim": 6, "head_dim": 22},
            {"rope_theta": 500.0, "compress_rope_theta": 40.0, "bos_token_id": 5},
        ],
        ids=str,
    )
    def test_round_trip(self, changes):
        config = tiny_config(**changes)
        assert ModelConfig.from_hf(config.to_hf()) == config

    def test_it_is_written_in_the_released_form(self):
        released = without(official_flash(), "torch_dtype")
        assert shipped("flash").to_hf() == released | {"initializer_range": 0.006}

    @pytest.mark.parametrize("name", ["debug", "nano", "flash", "pro"])
    def test_the_official_keys_alone_will_do(self, name):
        config = shipped(name)
        official = {k: v for k, v in config.to_hf().items() if k in official_flash()}
        assert ModelConfig.from_hf(official) == config

    @pytest.mark.parametrize(
        "changes",
        [
            {"pad_token_id": 9},
            {"rope_scaling": None},
            {"num_hash_layers": 0},
            {"csa_compress_ratio": 8, "hca_compress_ratio": 32},
            {"qk_rope_head_dim": 30, "head_dim": 44, "index_head_dim": 32},
        ],
        ids=str,
    )
    def test_the_form_of_former_exports(self, changes):
        config = tiny_config(**changes)
        assert ModelConfig.from_hf(former_form(config)) == config

    def test_official_file(self):
        config = ModelConfig.from_hf(official_flash(), initializer_range=0.006)
        assert config == shipped("flash")

    def test_what_transformers_makes_of_the_official_file(self):
        theirs = DeepseekV4Config(**official_flash()).to_dict()
        assert ModelConfig.from_hf(theirs, initializer_range=0.006) == shipped("flash")

    def test_what_transformers_makes_of_ours(self):
        for config in (tiny_config(), tiny_config(rope_scaling=None), shipped("pro")):
            theirs = DeepseekV4Config(**config.to_hf()).to_dict()
            assert ModelConfig.from_hf(theirs) == config

    def test_transformers_defaults_are_flash_s_sizes(self):
        theirs = DeepseekV4Config().to_dict() | {"qk_rope_head_dim": 64}
        config = ModelConfig.from_hf(theirs)
        assert (config.hidden_size, config.num_hash_layers, config.head_dim) == (4096, 3, 512)

    def test_training_fields_are_given_beside_the_file(self):
        config = ModelConfig.from_hf(official_flash(), balance_loss_weight=0.5)
        assert config.balance_loss_weight == 0.5
        assert config.initializer_range == 0.02

    def test_eos_may_be_a_list(self):
        assert ModelConfig.from_hf(official_flash() | {"eos_token_id": [7, 8]}).eos_token_id == 7

    def test_the_share_of_rotary_dims_will_do(self):
        keys = without(official_flash(), "qk_rope_head_dim") | {"partial_rotary_factor": 0.125}
        assert ModelConfig.from_hf(keys).qk_rope_head_dim == 64

    @pytest.mark.parametrize(
        ("changes", "removed", "message"),
        [
            ({}, ("index_topk",), "no index_topk"),
            ({}, ("rope_theta",), "no rope_theta"),
            ({"hidden_size": None}, (), "no hidden_size"),
            ({}, ("compress_ratios",), "neither layer_types nor compress_ratios"),
            ({}, ("num_hash_layers",), "neither mlp_layer_types nor num_hash_layers"),
            ({}, ("qk_rope_head_dim",), "neither qk_rope_head_dim nor partial_rotary_factor"),
            ({"model_type": "llama"}, (), "model_type = 'llama'; supported: 'deepseek_v4'"),
            (
                {"scoring_func": "sigmoid"},
                (),
                "'sigmoid'; supported: 'sqrtsoftplus'",
            ),
            ({"num_key_value_heads": 8}, (), "num_key_value_heads = 8; supported: 1"),
            ({"tie_word_embeddings": True}, (), "tie_word_embeddings"),
            ({"compress_ratios": [0, 7] * 30}, (), "compression ratio 7"),
            ({"compress_ratios": [0, 4, 128]}, (), "layer_types has 3 entries"),
            ({"layer_types": ["full_attention"] * 43}, (), "layer type 'full_attention'"),
            ({"mlp_layer_types": ["moe"] * 42 + ["hash_moe"]}, (), "all hash_moe layers before"),
            ({"rope_scaling": {"type": "linear", "factor": 2}}, (), "rope_type 'linear'"),
            ({"rope_scaling": {"type": "yarn", "factor": 2}}, (), "has no original_max_position"),
            ({"rope_parameters": {"compress": {"rope_theta": 1.0}}}, (), "rope_parameters"),
            ({"layer_types": ["sliding_attention"] * 43}, (), "has compress_ratios = [0, 0, 4"),
            ({"mlp_layer_types": ["moe"] * 43}, (), "num_hash_layers = 3, but its mlp_layer_types"),
            ({"partial_rotary_factor": 0.25}, (), "qk_rope_head_dim = 64, but partial_rotary"),
            ({"topk_method": "greedy"}, (), "topk_method = 'greedy'; supported: 'noaux_tc'"),
            ({"n_shared_experts": 2}, (), "n_shared_experts = 2: Input should be 1"),
            ({"num_local_experts": 8}, (), "n_routed_experts = 256 and num_local_experts = 8"),
            (
                {"rope_parameters": {"main": {"rope_theta": 9.0}}},
                (),
                "rope_theta = 10000 and rope_parameters.main.rope_theta = 9.0; make them agree",
            ),
            (
                {"rope_parameters": {"compress": {"rope_theta": 160000}}},
                (),
                "rope_scaling.factor = 16 and rope_parameters.compress.factor = None; make",
            ),
            (
                {
                    "compress_rate_csa": 8,
                    "compress_rates": {"compressed_sparse_attention": 4},
                },
                (),
                "compress_rate_csa = 8 and compress_rates.compressed_sparse_attention = 4; make",
            ),
            ({"hidden_size": "wide"}, (), "hidden_size"),
            ({"rope_scaling": "yarn"}, (), "rope_scaling = 'yarn': Input should be a valid dict"),
            ({"compress_ratios": [0, "4"]}, (), "compress_ratios.1 = '4': Input should be a"),
            ({"eos_token_id": []}, (), "eos_token_id = []: Input should be a valid integer"),
            ({"o_groups": 7}, (), "num_attention_heads (64) must be a multiple of o_groups (7)"),
            ({"n_routed_experts": 5}, (), "num_experts_per_tok (6) must be at most"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_one_sentence_for_what_is_missing_or_not_v4(self, changes, removed, message):
        with pytest.raises(ModelConfigError) as caught:
            ModelConfig.from_hf(without(official_flash() | changes, *removed))
        assert message in str(caught.value) and "\n" not in str(caught.value)

    def test_attention_factor_is_refused(self):
        """YaRN's own attention factor would multiply the logits by 1.28."""
        keys = official_flash()
        keys["rope_scaling"] = keys["rope_scaling"] | {"attention_factor": 1.277}
        with pytest.raises(ModelConfigError, match=r"attention_factor = 1\.277; supported: 1\.0"):
            ModelConfig.from_hf(keys)


class TestServers:
    """What vLLM and SGLang build from config.json is the model whose weights are there."""

    @pytest.mark.parametrize("name", ["debug", "nano", "flash", "pro"])
    def test_keys_and_types(self, name):
        assert servers.problems(shipped(name).to_hf()) == []

    @pytest.mark.parametrize(
        "name", [*servers.VALUES, "num_hash_layers", "compress_ratios", "sliding_window"]
    )
    def test_a_missing_key_is_seen(self, name):
        assert servers.problems(without(shipped("flash").to_hf(), name)) != []

    def test_the_former_form_is_not_what_they_read(self):
        missing = {"num_hash_layers", "topk_method", "compress_ratios", "rope_parameters"}
        assert missing <= set(servers.problems(former_form(shipped("flash"))))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
BOTH_FORMS = {**former_form(tiny_config()), **tiny_config().to_hf()}
KINDS = ("main", "compress")
NESTED = [f"rope_parameters.{kind}.{key}" for kind in KINDS for key in ("rope_theta", "rope_type")]
INNER = ["rope_scaling.factor", "rope_scaling.type", "compress_rates.compressed_sparse_attention"]


@given(st.sampled_from([*BOTH_FORMS, "rope_parameters.main", *NESTED, *INNER]), ANYTHING)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_whatever_a_key_has_it_is_read_or_refused_in_a_sentence(key, value):
    for form in (BOTH_FORMS, former_form(tiny_config())):
        keys = copy.deepcopy(form)
        *above, last = key.split(".")
        section = keys
        for name in above:
            section = section.get(name, {})
        section[last] = value
        try:
            ModelConfig.from_hf(keys)
        except ModelConfigError as error:
            assert "\n" not in str(error)
