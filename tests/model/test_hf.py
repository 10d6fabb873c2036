"""Configurations and weights of others: official names and files, and transformers'."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config

from model import ModelConfig, ModelConfigError, V4Model
from model.hf import from_official, named_tensors, to_official
from tests.model.tiny import random_model, random_tokens, tiny_config, transformers_twin
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
            {
                "rope_theta": 500.0,
                "compress_rope_theta": 40.0,
                "bos_token_id": 5,
                "pad_token_id": 9,
            },
        ],
        ids=str,
    )
    def test_round_trip(self, changes):
        config = tiny_config(**changes)
        assert ModelConfig.from_hf(config.to_hf()) == config

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
            ({"hidden_size": "wide"}, (), "hidden_size"),
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


def blank(config: ModelConfig) -> V4Model:
    model = V4Model(config)
    model.init_weights(77)
    return model


def official_state(model: V4Model) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in to_official(named_tensors(model).items())}


def assert_equal(model: V4Model, other: V4Model, mtp: bool = True) -> None:
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        if mtp or not name.startswith("mtp."):
            assert torch.equal(tensor, theirs[name]), name


# The names on disk as docs/architecture-v4.md lists them, experts one by one.
_HYPER = r"(fn|base|scale)"
_COMPRESSOR = r"compressor\.(wkv\.weight|wgate\.weight|ape|norm\.weight)"
_BLOCK = (
    rf"(attn_norm\.weight|ffn_norm\.weight|hc_(attn|ffn)_{_HYPER}"
    r"|attn\.(wq_a|q_norm|wq_b|wkv|kv_norm|wo_a|wo_b)\.weight|attn\.attn_sink"
    rf"|attn\.{_COMPRESSOR}|attn\.indexer\.(wq_b|weights_proj)\.weight"
    rf"|attn\.indexer\.{_COMPRESSOR}|ffn\.gate\.(weight|bias|tid2eid)"
    r"|ffn\.experts\.\d+\.w[123]\.weight|ffn\.shared_experts\.w[123]\.weight)"
)
_OFFICIAL = re.compile(
    rf"embed\.weight|head\.weight|norm\.weight|hc_head_{_HYPER}|layers\.\d+\.{_BLOCK}"
    rf"|mtp\.0\.({_BLOCK}|(e_proj|h_proj|enorm|hnorm|norm)\.weight|hc_head_{_HYPER})"
)


class TestWeights:
    def test_names_on_disk_are_the_official_ones(self):
        state = official_state(random_model(tiny_config()))
        assert [name for name in state if _OFFICIAL.fullmatch(name) is None] == []
        assert state["layers.2.ffn.experts.7.w2.weight"].shape == (32, 24)
        assert state["mtp.0.ffn.experts.0.w1.weight"].shape == (24, 32)

    def test_official_names_in_any_order(self):
        source = random_model(tiny_config())
        model = blank(tiny_config())
        model.load_hf_state_dict(dict(reversed(official_state(source).items())))
        assert_equal(model, source)

    def test_stacking_and_unstacking_are_each_other_s_inverse(self):
        own = named_tensors(random_model(tiny_config()))
        back = from_official(dict(to_official(own.items())))
        assert back.keys() == own.keys()
        assert all(torch.equal(back[name], own[name]) for name in own)

    def test_transformers_names(self):
        source = random_model(tiny_config())
        model = blank(tiny_config())
        model.load_hf_state_dict(source.hf_state_dict())
        assert_equal(model, source)

    def test_transformers_own_state_has_no_mtp_and_that_stays_as_it_was(self):
        source = random_model(tiny_config())
        twin = transformers_twin(source)
        model, before = blank(tiny_config()), blank(tiny_config())
        model.load_hf_state_dict(twin.state_dict())
        assert_equal(model, source, mtp=False)
        assert torch.equal(model.mtp[0].e_proj.weight, before.mtp[0].e_proj.weight)
        tokens = random_tokens(source.config, 1, 21)
        assert torch.equal(model(tokens).logits, source(tokens).logits)

    def test_a_model_without_mtp_takes_the_rest(self):
        source = random_model(tiny_config())
        model = blank(tiny_config(num_nextn_predict_layers=0))
        model.load_hf_state_dict(official_state(source))
        assert torch.equal(model.head.weight, source.head.weight)

    def test_bf16_weights_go_into_an_fp32_model_and_back(self):
        source = random_model(tiny_config(), dtype=torch.bfloat16)
        model = blank(tiny_config())
        model.load_hf_state_dict(official_state(source))
        assert model.head.weight.dtype == torch.float32
        assert torch.equal(model.head.weight, source.head.weight.float())

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ("layers.1.attn.attn_sink", "lack layers.1.attn.attn_sink (1 missing in all)"),
            ("layers.1.ffn.experts.3.w1.weight", "layers.1.ffn.experts.w1 has no expert 3"),
            ("layers.1.ffn.experts.7.w1.weight", "layers.1.ffn.experts.w1 has shape (7, 24, 32)"),
            ("layers.0.ffn.gate.tid2eid", "layers.0.ffn.gate.tid2eid"),
            ("mtp.0.hnorm.weight", "lack mtp.0.hnorm.weight"),
        ],
    )
    def test_a_missing_name(self, removed, message):
        state = official_state(random_model(tiny_config()))
        del state[removed]
        self.assert_refused(state, message)

    def test_an_unknown_name(self):
        state = official_state(random_model(tiny_config()))
        state["layers.9.attn_norm.weight"] = torch.zeros(32)
        self.assert_refused(state, "layers.9.attn_norm.weight, which this model does not have")

    def test_another_shape(self):
        state = official_state(random_model(tiny_config()))
        state["norm.weight"] = torch.zeros(31)
        self.assert_refused(state, "norm.weight has shape (31,); this model has (32,)")

    def test_transformers_names_missing_and_unknown(self):
        state = random_model(tiny_config()).hf_state_dict()
        sinks = state.pop("model.layers.2.self_attn.sinks")
        self.assert_refused(state, "lack layers.2.attn.attn_sink")
        state["model.layers.2.self_attn.sink"] = sinks
        state["model.layers.2.self_attn.sinks"] = sinks
        self.assert_refused(state, "model.layers.2.self_attn.sink, which this model does not have")

    def assert_refused(self, state: dict[str, torch.Tensor], message: str) -> None:
        model, before = blank(tiny_config()), blank(tiny_config())
        with pytest.raises(ModelConfigError) as caught:
            model.load_hf_state_dict(state)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert_equal(model, before)  # nothing was overwritten
