"""Weights of others: official names and files, and transformers'."""

from __future__ import annotations

import re

import pytest
import torch

from model import ModelConfig, ModelConfigError, V4Model
from model.hf import from_official, named_tensors, to_official
from tests.model.tiny import random_model, random_tokens, tiny_config, transformers_twin


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
