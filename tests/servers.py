"""Types and values of config.json that vLLM and SGLang need, beyond the names of its keys.

Both build a model from it alone. A key that is missing is either an error there or, worse, a
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INTEGERS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups"),
    *("sliding_window", "index_topk", "index_n_heads", "index_head_dim"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("num_hash_layers", "num_nextn_predict_layers", "max_position_embeddings"),
    *("hc_mult", "hc_sinkhorn_iters", "bos_token_id", "eos_token_id"),
)
NUMBERS = (
    *("rms_norm_eps", "hc_eps", "swiglu_limit", "routed_scaling_factor"),
    *("rope_theta", "compress_rope_theta"),
)
VALUES = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",  # a missing one is no error: the router then has no bias
    "num_key_value_heads": 1,
}
YARN = {
    "type": str,
    "factor": (int, float),
    "original_max_position_embeddings": int,
    "beta_fast": (int, float),
    "beta_slow": (int, float),
}


def problems(config: Mapping[str, Any]) -> list[str]:
    """Names the keys of config.json that a server misses, or misreads."""
    wrong = [name for name in INTEGERS if type(config.get(name)) is not int]
    wrong += [name for name in NUMBERS if type(config.get(name)) not in (int, float)]
    wrong += [name for name, value in VALUES.items() if config.get(name) != value]
    ratios = config.get("compress_ratios") or []
    layers = config["num_hidden_layers"]
    if len(ratios) < layers or not set(ratios) <= {0, 4, 128}:
        wrong.append("compress_ratios")
    scaling = config.get("rope_scaling", {})
    if scaling is not None:
        wrong += [f"rope_scaling.{k}" for k, t in YARN.items() if not isinstance(scaling.get(k), t)]
    # Both prefer the nested form, where there is one, to the flat keys.
    return wrong + [name for name in ("rope_parameters", "mlp_layer_types") if name in config]
