"""Converts ModelConfig fields to the official `config.json`, and back from transformers' form too.

The official form is the one that vLLM, SGLang, transformers and the official code all read.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import ModelConfigError

_LAYER_TYPES: dict[str, str] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_HF_LAYER_TYPES = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}

# Fields that have the same name and meaning in our configuration and in a Hugging Face one.
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
    "max_position_embeddings",
)
_OPTIONAL_FIELDS = (
    "num_nextn_predict_layers",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
)
_FIXED_FIELDS = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",  # vLLM makes router biases only for this method
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_OFFICIAL_RATIOS = {"window": 0, "csa": 4, "hca": 128}
_YARN_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _Rope(_Form):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None


class _NestedRope(_Rope):
    main: _Rope = _Rope()
    compress: _Rope = _Rope()


class _Keys(_Form):
    """Types of the keys that are computed with here; ModelConfig checks those of all others."""

    num_hidden_layers: int | None = None
    head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    partial_rotary_factor: float | None = None
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    compress_ratios: list[int] | None = None
    compress_rates: dict[str, int] | None = None
    compress_rate_csa: int = 4
    compress_rate_hca: int = 128
    rope_scaling: _Rope | None = None
    rope_parameters: _NestedRope | None = None


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a ModelConfig from ``to_dict()`` of transformers, or ``config.json``.

    Raises ModelConfigError if a needed key is missing, or has an unsupported value.
    """
    try:
        _Keys.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].partition(" or instance")[0]
        raise ModelConfigError(
            f"config.json has {name} = {problem['input']!r}: {message}"
        ) from None
    _refuse_other_architectures(config)
    _refuse_second_values(config)
    fields: dict[str, Any] = {}
    for name in _SHARED_FIELDS:
        source = "num_local_experts" if name not in config and name == "n_routed_experts" else name
        if config.get(source) is None:
            raise ModelConfigError(f"config.json has no {name}; it must be given")
        fields[name] = config[source]
    for name in (*_OPTIONAL_FIELDS, "pad_token_id"):
        if config.get(name) is not None:
            fields[name] = config[name]
    if isinstance(eos := fields.get("eos_token_id"), list) and eos:
        fields["eos_token_id"] = eos[0]
    fields |= _layer_types_from_hf(config) | _rope_from_hf(config)
    fields["num_hash_layers"] = _hash_layers_from_hf(config)
    return fields


def fields_to_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the official ``config.json`` from the fields of a ModelConfig.

    Where the official keys cannot represent the model, transformers' own are added.
    """
    yarn = config["rope_scaling"]
    ratios = [_ratios(config)[kind] for kind in config["layer_types"]]
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        **{name: config[name] for name in (*_SHARED_FIELDS, *_OPTIONAL_FIELDS)},
        "qk_rope_head_dim": config["qk_rope_head_dim"],
        "num_hash_layers": config["num_hash_layers"],
        "compress_ratios": [*ratios, *[0] * config["num_nextn_predict_layers"]],
        "rope_scaling": None if yarn is None else {"type": "yarn", **yarn},
        "use_cache": True,
        **_FIXED_FIELDS,
        **_unofficial_keys(config),
    }


def _ratios(config: Mapping[str, Any]) -> dict[str, int]:
    return {"window": 0, "csa": config["csa_compress_ratio"], "hca": config["hca_compress_ratio"]}


def _unofficial_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that transformers needs in addition, to build the same model."""
    keys: dict[str, Any] = {}
    if _ratios(config) != _OFFICIAL_RATIOS:
        keys["layer_types"] = [_HF_LAYER_TYPES[kind] for kind in config["layer_types"]]
        keys["compress_rates"] = {
            _HF_LAYER_TYPES[kind]: ratio for kind, ratio in _ratios(config).items() if ratio
        }
    # transformers divides by head_dim, multiplies by it and truncates: 30 of 44 dims become 29.
    share = config["qk_rope_head_dim"] / config["head_dim"]
    if int(config["head_dim"] * share) != config["qk_rope_head_dim"]:
        keys["partial_rotary_factor"] = math.nextafter(share, 1.0)
    return keys


def _refuse_other_architectures(config: Mapping[str, Any]) -> None:
    for name, value in {**_FIXED_FIELDS, "mlp_bias": False}.items():
        if name == "attention_dropout":  # any rate: it belongs to training, not to the weights
            continue
        if config.get(name, value) != value:
            raise ModelConfigError(
                f"config.json has {name} = {config[name]!r}; supported: {value!r}"
            )


def _refuse_second_values(config: Mapping[str, Any]) -> None:
    """Raises ModelConfigError where two forms of one fact differ; transformers reads either."""
    rates = config.get("compress_rates") or {}
    nested = config.get("rope_parameters") or {}
    main, compress = (nested.get(name) or {} for name in ("main", "compress"))
    forms = [
        ("n_routed_experts", "num_local_experts", config.get("num_local_experts")),
        ("rope_theta", "rope_parameters.main.rope_theta", main.get("rope_theta")),
        ("compress_rope_theta", "rope_parameters.compress.rope_theta", compress.get("rope_theta")),
    ]
    for kind in ("csa", "hca"):
        rate = rates.get(_HF_LAYER_TYPES[kind])
        forms.append((f"compress_rate_{kind}", f"compress_rates.{_HF_LAYER_TYPES[kind]}", rate))
    scaling = config.get("rope_scaling")
    if scaling and compress:
        for field in _YARN_FIELDS:
            if scaling.get(field) != compress.get(field):
                raise ModelConfigError(
                    f"config.json has rope_scaling.{field} = {scaling.get(field)} and "
                    f"rope_parameters.compress.{field} = {compress.get(field)}; make them agree"
                )
    for name, other, value in forms:
        if value is not None and config.get(name, value) not in (value, None):
            raise ModelConfigError(
                f"config.json has {name} = {config[name]} and {other} = {value}; make them agree"
            )


def _layer_types_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    rates = config.get("compress_rates") or {}
    csa = rates.get("compressed_sparse_attention", config.get("compress_rate_csa", 4))
    hca = rates.get("heavily_compressed_attention", config.get("compress_rate_hca", 128))
    if config.get("layer_types") is not None:
        try:
            types = [_LAYER_TYPES[name] for name in config["layer_types"]]
        except KeyError as error:
            known = ", ".join(_LAYER_TYPES)
            raise ModelConfigError(
                f"config.json has layer type {error.args[0]!r}; supported: {known}"
            ) from None
        ratios = [{"window": 0, "csa": csa, "hca": hca}[kind] for kind in types]
        _refuse_contradiction(config, "layer_types", "compress_ratios", ratios, stop=layers)
    elif config.get("compress_ratios") is not None:
        # The last ratio of the official list is the MTP block's, which always has window attention.
        kinds: dict[int, str] = {0: "window", csa: "csa", hca: "hca"}
        ratios = config["compress_ratios"][:layers]
        unknown = [ratio for ratio in ratios if ratio not in kinds]
        if unknown:
            raise ModelConfigError(
                f"config.json has compression ratio {unknown[0]}; supported: {sorted(kinds)}"
            )
        types = [kinds[ratio] for ratio in ratios]
    else:
        raise ModelConfigError("config.json has neither layer_types nor compress_ratios")
    return {
        "layer_types": types,
        "csa_compress_ratio": csa,
        "hca_compress_ratio": hca,
    }


def _rope_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("qk_rope_head_dim") is not None:
        rotary = config["qk_rope_head_dim"]
        share = config.get("partial_rotary_factor")
        if share is not None and round(config["head_dim"] * share) != rotary:
            raise ModelConfigError(
                f"config.json has qk_rope_head_dim = {rotary}, but partial_rotary_factor = {share} "
                f"of head_dim = {config['head_dim']}; make them agree"
            )
    elif config.get("partial_rotary_factor") is not None:
        rotary = int(config["head_dim"] * config["partial_rotary_factor"])
    else:
        raise ModelConfigError("config.json has neither qk_rope_head_dim nor partial_rotary_factor")
    nested = config.get("rope_parameters") or {}
    if isinstance(nested.get("compress"), dict):
        try:
            bases = {
                "rope_theta": nested["main"]["rope_theta"],
                "compress_rope_theta": nested["compress"]["rope_theta"],
            }
        except KeyError as error:
            raise ModelConfigError(
                f"config.json's rope_parameters lack {error.args[0]!r}; they need main.rope_theta "
                "and compress.rope_theta"
            ) from None
        scaling = nested["compress"]
    else:
        bases = {}
        scaling = config.get("rope_scaling") or nested
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ModelConfigError(f"config.json has rope_type {kind!r}; supported: 'default', 'yarn'")
    if scaling.get("attention_factor", 1.0) != 1.0:
        raise ModelConfigError(
            f"config.json has attention_factor = {scaling['attention_factor']}; supported: 1.0"
        )
    yarn = None
    if kind == "yarn":
        try:
            yarn = {name: scaling[name] for name in _YARN_FIELDS}
        except KeyError as error:
            raise ModelConfigError(f"config.json's yarn rope has no {error.args[0]}") from None
    return {"qk_rope_head_dim": rotary, "rope_scaling": yarn} | bases


def _hash_layers_from_hf(config: Mapping[str, Any]) -> int:
    types = config.get("mlp_layer_types")
    if types is None:
        if config.get("num_hash_layers") is None:
            raise ModelConfigError("config.json has neither mlp_layer_types nor num_hash_layers")
        return config["num_hash_layers"]
    hashed = types.count("hash_moe")
    if list(types) != ["hash_moe"] * hashed + ["moe"] * (len(types) - hashed):
        raise ModelConfigError(
            "config.json's mlp_layer_types must list all hash_moe layers before all moe layers"
        )
    _refuse_contradiction(config, "mlp_layer_types", "num_hash_layers", hashed)
    return hashed


def _refuse_contradiction(
    config: Mapping[str, Any], name: str, other: str, expected: Any, stop: int | None = None
) -> None:
    """Raises ModelConfigError if the key `other`, up to item `stop`, is not what `name` implies."""
    value = config.get(other)
    if isinstance(value, list | tuple):
        value = list(value[:stop])
    if value is not None and value != expected:
        raise ModelConfigError(
            f"config.json has {other} = {value}, but its {name} imply {expected}; make them agree"
        )
