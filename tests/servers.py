"""What vLLM and SGLang read of a Hugging Face folder: their rules, written down as tables.

Both build a model from config.json alone, rename the folder's tensors, and join some of them into
one parameter. A key that is missing is either an error there or, worse, a default.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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


# Renaming of tensors, in order, and the parts that are joined into one parameter.
VLLM_NAMES = (
    (r"^(layers|norm|mtp)\.", r"model.\1."),
    (r"^hc_head", "model.hc_head"),
    (r"^embed\.weight$", "model.embed_tokens.weight"),
    (r"^head\.weight$", "lm_head.weight"),
    (r"\.ffn\.gate\.bias$", ".ffn.gate.e_score_correction_bias"),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w[13]\.", ".shared_experts.gate_up_proj."),
    (r"\.attn\.(wq_a|wkv)\.", ".attn.fused_wqa_wkv."),
    (r"\.compressor\.(wkv|wgate)\.", ".compressor.fused_wkv_wgate."),
    (r"\.experts\.\d+\.w[13]\.", ".experts.w13_"),
    (r"\.experts\.\d+\.w2\.", ".experts.w2_"),
)
SGLANG_NAMES = (
    (r"^(layers|norm)\.", r"model.\1."),
    (r"^hc_head", "model.hc_head"),
    (r"^embed\.weight$", "model.embed_tokens.weight"),
    (r"^head\.weight$", "lm_head.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.gate\.tid2eid$", ".topk.tid2eid"),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w[13]\.", ".shared_experts.gate_up_proj."),
    (r"\.self_attn\.(wq_a|wkv)\.", ".self_attn.wqkv_a."),
    (r"\.compressor\.(wkv|wgate)\.", ".compressor.wkv_gate."),
    (r"\.experts\.\d+\.w[13]\.", ".experts.w13_"),
    (r"\.experts\.\d+\.w2\.", ".experts.w2_"),
)


def loaded(names: Iterable[str], renaming: tuple[tuple[str, str], ...]) -> Counter[str]:
    """Counts the tensors that reach each parameter; both leave out ``mtp.*`` here."""
    result: Counter[str] = Counter()
    for name in names:
        if name.startswith("mtp."):
            continue
        for pattern, replacement in renaming:
            name = re.sub(pattern, replacement, name)
        result[name] += 1
    return result


def expected(config: Mapping[str, Any], renaming: tuple[tuple[str, str], ...]) -> Counter[str]:
    """Counts the tensors that each parameter of the model needs which config.json describes."""
    return loaded(_needed(config), renaming)


def _needed(config: Mapping[str, Any]) -> Iterator[str]:
    yield from ("embed.weight", "head.weight", "norm.weight")
    yield from (f"hc_head_{part}" for part in ("fn", "base", "scale"))
    for layer in range(config["num_hidden_layers"]):
        place, ratio = f"layers.{layer}", config["compress_ratios"][layer]
        yield from (f"{place}.{name}.weight" for name in ("attn_norm", "ffn_norm"))
        for part in ("fn", "base", "scale"):
            yield from (f"{place}.hc_attn_{part}", f"{place}.hc_ffn_{part}")
        for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b"):
            yield f"{place}.attn.{name}.weight"
        yield f"{place}.attn.attn_sink"
        compressors = ["attn.compressor"] if ratio else []
        if ratio == 4:
            compressors.append("attn.indexer.compressor")
            yield from (f"{place}.attn.indexer.{name}.weight" for name in ("wq_b", "weights_proj"))
        for compressor in compressors:
            yield f"{place}.{compressor}.ape"
            yield from (f"{place}.{compressor}.{n}.weight" for n in ("wkv", "wgate", "norm"))
        yield f"{place}.ffn.gate.weight"
        if layer < config.get("num_hash_layers", 0):
            yield f"{place}.ffn.gate.tid2eid"
        elif config.get("topk_method") == "noaux_tc":
            yield f"{place}.ffn.gate.bias"
        experts = [f"experts.{expert}" for expert in range(config["n_routed_experts"])]
        for expert in (*experts, "shared_experts"):
            yield from (f"{place}.ffn.{expert}.{name}.weight" for name in ("w1", "w2", "w3"))


def linear_modules(config: Mapping[str, Any], server: str) -> Iterator[str]:
    """Yields the names by which a server looks up its linears in `modules_to_not_convert`.

    These are the linears that become FP8 with a `quantization_config` unless they are listed
    there; routed experts, which have a rule of their own, are not among them.
    """
    attention, ffn, joined = {
        "vllm": ("attn", "ffn", "fused_wqa_wkv"),
        "sglang": ("self_attn", "mlp", "wqkv_a"),
    }[server]
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        yield from (f"{place}.{attention}.{name}" for name in (joined, "wq_b", "wo_a", "wo_b"))
        if config["compress_ratios"][layer] == 4:
            yield f"{place}.{attention}.indexer.wq_b"
        yield from (f"{place}.{ffn}.shared_experts.{n}" for n in ("gate_up_proj", "down_proj"))


def skips(module: str, listed: Iterable[str], server: str) -> bool:
    """Whether a server leaves the weights of `module` as they are.

    SGLang looks for an entry among the module's path segments. vLLM renames the entries as it
    renames tensors, and wants the whole name; for a shared expert a longer entry will do, too.
    """
    if server == "sglang":
        return any(f".{entry.removeprefix('model.')}." in f".{module}." for entry in listed)
    names = [re.sub(r"^(layers|mtp)\.", r"model.\1.", entry) for entry in listed]
    names = [name.replace(".shared_experts.w2", ".shared_experts.down_proj") for name in names]
    if "experts" in module:
        return any(module in name for name in names)
    return module in names
