"""Any model that a config allows is loaded by transformers, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from data import Tokenizer
from model import ModelConfig
from model.hf import named_tensors, to_official
from tests.model.tiny import random_model, relative_error, tiny_config
from trainer.config import load_config
from trainer.export.hf_folder import read_hf_config, write_hf_folder

# As in tests/model/test_parity.py: sums of fp32 products taken in another order. Five streams and
# wide epsilons add to it; the worst of 800 random models was 2.4e-5.
LOGITS_RTOL = 5e-5
LENGTH = 40


def even(largest: int) -> st.SearchStrategy[int]:
    return st.integers(1, largest // 2).map(lambda half: 2 * half)


YARN = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.5, 1.0, 2.5, 16.0]),
        "original_max_position_embeddings": st.sampled_from([1, 4, 64, 4096, 10**6]),
        "beta_fast": st.sampled_from([1e-3, 1.0, 5.0, 32.0]),
        "beta_slow": st.sampled_from([1e-4, 0.5, 1.0, 40.0]),
    }
)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a small model; about half of them contradict each other."""
    layers, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kinds = st.sampled_from(["window", "csa", "hca"])
    bases = st.sampled_from([1.5, 50.0, 160_000.0])
    fields = {
        "vocab_size": st.integers(3, 40),
        "hidden_size": st.sampled_from([8, 16, 24]),
        "max_position_embeddings": st.sampled_from([1, 64, 4096]),
        "num_attention_heads": st.integers(1, 3).map(lambda heads: heads * groups),
        "head_dim": even(48),
        "qk_rope_head_dim": even(32),
        "q_lora_rank": st.integers(1, 9),
        "o_lora_rank": st.integers(1, 7),
        "sliding_window": st.integers(1, LENGTH + 2),
        "layer_types": st.lists(kinds, min_size=layers, max_size=layers),
        "csa_compress_ratio": st.sampled_from([4, 1, 2, 3, 7]),
        "hca_compress_ratio": st.sampled_from([128, 1, 4, 5, 16]),
        "index_n_heads": st.integers(1, 4),
        "index_head_dim": even(32),
        "index_topk": st.integers(1, 12),
        "rope_theta": bases,
        "compress_rope_theta": bases,
        "rope_scaling": st.none() | YARN,
        "num_hash_layers": st.integers(0, layers),
        "n_routed_experts": st.integers(1, 11),
        "num_experts_per_tok": st.integers(1, 4),
        "n_shared_experts": st.sampled_from([1, 1, 1, 2]),
        "moe_intermediate_size": st.sampled_from([8, 16]),
        "routed_scaling_factor": st.sampled_from([0.5, 1.0, 2.5]),
        "swiglu_limit": st.sampled_from([0.1, 10.0]),
        "hc_mult": st.integers(1, 5),
        "hc_sinkhorn_iters": st.integers(1, 4),
        "hc_eps": st.sampled_from([1e-6, 1e-3]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
        "num_nextn_predict_layers": st.integers(0, 1),
    }
    return {
        "num_hidden_layers": layers,
        "o_groups": groups,
        "initializer_range": 0.3,
        **{name: draw(strategy) for name, strategy in fields.items()},
    }


def fixed(**changes: Any) -> dict[str, Any]:
    return tiny_config(**changes).model_dump()


@given(sizes())
@example(fixed(head_dim=44, qk_rope_head_dim=30, index_head_dim=32))
@example(fixed(n_shared_experts=1) | {"n_shared_experts": 2})
@example(fixed(rope_scaling={**fixed()["rope_scaling"], "original_max_position_embeddings": 1}))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_transformers_loads_any_model(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError as error:
        assert all("\n" not in problem["msg"] for problem in error.errors())
        return
    folder = tmp_path_factory.mktemp("any") / "hf"
    model = random_model(config)
    weights = dict(to_official(named_tensors(model).items()))
    tokenizer = Tokenizer(load_config(tiny).data.tokenizer.path)
    write_hf_folder(folder, config, weights, tokenizer, "float32")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        tokens = tokens_without_ties(config)
        error = relative_error(model(tokens).logits, theirs.eval()(tokens).logits)
    assert error < LOGITS_RTOL
    assert read_hf_config(folder) == config


def tokens_without_ties(config: ModelConfig) -> torch.Tensor:
    """Rows in which no indexer has to choose: scores of 0, which tie, are common here."""
    length = LENGTH
    if "csa" in config.layer_types:
        length = min(length, (config.index_topk + 1) * config.csa_compress_ratio - 1)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (2, length), generator=generator)
