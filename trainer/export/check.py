"""`v4 export --check`: whether vLLM and SGLang find in a folder what they read from it.

What they read is in servers/*.json, which docs/write_servers.py derives from their wheels. Neither
is imported, and of the weights only the files' headers are read. A name that a server does not find
is an error in vLLM and no more than a warning in SGLang, whose parameter then keeps random numbers;
a key of config.json that is missing becomes a default in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data.storage import AnyPath
from model import ModelConfig, ModelConfigError, V4Model
from model.hf import named_tensors, to_official
from model.kernels.block_sizes import FP8_BLOCK, MXFP4_BLOCK
from trainer.export.hf_folder import CONFIG_JSON, TensorHeader, read_headers, read_object
from trainer.process.errors import ExportError

SERVERS = Path(__file__).with_name("servers")
OFFICIAL_KEYS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "max_position_embeddings"),
        *("moe_intermediate_size", "model_type", "n_routed_experts", "n_shared_experts"),
        *("norm_topk_prob", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers"),
        *("num_hash_layers", "num_key_value_heads", "num_nextn_predict_layers", "head_dim"),
        *("qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads"),
        *("index_head_dim", "index_topk", "sliding_window", "compress_ratios", "rope_theta"),
        *("compress_rope_theta", "rope_scaling", "hc_mult", "hc_sinkhorn_iters", "hc_eps"),
        *("rms_norm_eps", "routed_scaling_factor", "scoring_func", "swiglu_limit"),
        *("tie_word_embeddings", "topk_method", "vocab_size"),
    }
)
"""Keys of the released config.json that describe a text model; others that a server reads are of
other models, or have their default in the release too."""
_DERIVED = {
    "layer_types": "compress_ratios",
    "compress_rates": "compress_ratios",
    "mlp_layer_types": "num_hash_layers",
    "rope_parameters": "rope_scaling",
}
"""What transformers makes of official keys, and vLLM reads."""
_QUANTISED = ("F8_E4M3", "I8")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ServerLists:
    """What one server reads; see docs/write_servers.py."""

    server: str
    version: str
    files: list[str]
    config_keys: list[str]
    limits: dict[str, list[int]]
    renames: list[tuple[str, str]]
    joined: dict[str, list[str]]
    experts: list[str]
    scales: dict[str, str]
    parameters: dict[str, tuple[bool, str]]

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.server} {self.version}"

    def missing_keys(self, values: Mapping[str, Any]) -> list[str]:
        """Returns the official keys that are read and that config.json lacks."""
        keys = {_DERIVED.get(key, key) for key in self.config_keys if key not in values}
        return sorted(key for key in keys & OFFICIAL_KEYS if key not in values)

    def rename(self, name: str) -> str:
        """Returns the server's name of an official tensor before any are joined."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def skipped_modules(self, listed: Sequence[str]) -> Callable[[str], bool]:
        """Returns a predicate: a linear's name is among `modules_to_not_convert`.

        SGLang searches for an entry among the module's path segments. vLLM renames the entries as
        it renames tensors, and compares whole names; for a shared expert a longer entry suffices.
        """
        if self.server == "SGLang":
            parts = [f".{one.removeprefix('model.')}." for one in listed]
            return lambda module: any(part in f".{module}." for part in parts)
        names = {self.rename(one) for one in listed}
        return lambda module: (
            any(module in name for name in names) if "experts" in module else module in names
        )


def server_lists() -> list[ServerLists]:
    """Returns the lists of all servers."""
    return [ServerLists(**json.loads(path.read_text())) for path in sorted(SERVERS.glob("*.json"))]


def check_folder(folder: AnyPath) -> dict[str, list[str]]:
    """Returns the problems that each server would have: clauses by server and version.

    Raises ExportError for a folder that is not a Hugging Face folder, ModelConfigError for a
    config.json of another architecture.
    """
    values = read_object(folder / CONFIG_JSON)
    if values is None:
        raise ExportError(f"{folder}: not a Hugging Face folder, no config.json")
    headers = read_headers(folder)
    files = [name for name in _TOKENIZER_FILES if not (folder / name).is_file()]
    problems: dict[str, list[str]] = {}
    for lists in server_lists():
        clauses = problems[lists.label] = [f"lacks {name}" for name in files]
        keys = lists.missing_keys(values)
        if keys:
            clauses.append(f"{CONFIG_JSON} lacks {len(keys)} of its keys: {', '.join(keys)}")
        try:
            config = ModelConfig.from_hf(values)
        except ModelConfigError:
            if not keys:
                raise
            continue  # without them it is not known which tensors there should be
        clauses += _limits(lists, config)
        clauses += _Comparison(lists, config, values, headers).problems()
    return problems


def _limits(lists: ServerLists, config: ModelConfig) -> Iterator[str]:
    for name, sizes in lists.limits.items():
        if (size := getattr(config, name)) not in sizes:
            yield f"{name} is {size}, and its kernels have {', '.join(map(str, sizes))} alone"


@dataclass(frozen=True)
class _Comparison:
    """Compares a folder's tensors with the parameters that a server builds from its config.json."""

    lists: ServerLists
    config: ModelConfig
    values: Mapping[str, Any]
    headers: Mapping[str, TensorHeader]

    def problems(self) -> Iterator[str]:
        expected_parts = {parts for name in self._expected for parts in self._parts(name)}
        places = {name: self._place(name) for name in self.headers}
        weights = {name: p for name, p in places.items() if not name.endswith(".scale")}
        missing = expected_parts - {*weights.values()}
        yield from _count(
            "lacks", "tensor", "that it needs", (f"{n} ({p})" if p else n for n, p in missing)
        )
        unknown = {name for name, place in weights.items() if place not in expected_parts}
        stray = [n for n in self.headers if n.endswith(".scale") and not self._has_weight(n)]
        yield from _count("has", "tensor", "that it does not know", [*unknown, *stray])
        known = {name: place for name, place in weights.items() if name not in unknown}
        yield from self._wrong_formats(known)

    def _has_weight(self, scale: str) -> bool:
        weight = self.headers.get(f"{scale.removesuffix('.scale')}.weight")
        return weight is not None and weight.dtype in _QUANTISED

    @cached_property
    def _expected(self) -> dict[str, bool]:
        """Every parameter, and whether it is in FP8 or FP4."""
        settings = self.values.get("quantization_config") or {}
        quantised = bool(settings)
        skips = self.lists.skipped_modules(settings.get("modules_to_not_convert") or [])
        expected = {
            name: may_be and quantised and not skips(name.removesuffix(".weight"))
            for template, (may_be, where) in self.lists.parameters.items()
            for name in self._places_of(template, where)
        }
        experts = self.lists.rename("layers.0.ffn.experts.").removeprefix("model.layers.0.")
        for place in self._layers():
            for expert in range(self.config.n_routed_experts):
                for matrix in self.lists.experts:
                    expected[f"{place}.{experts}{expert}.{matrix}.weight"] = quantised
        return expected

    def _layers(self) -> list[str]:
        layers = [f"model.layers.{i}" for i in range(self.config.num_hidden_layers)]
        return layers + [f"mtp.{i}" for i in range(self.config.num_nextn_predict_layers)]

    def _places_of(self, template: str, where: str) -> Iterator[str]:
        """Yields the names of a parameter in all layers that have it."""
        config = self.config
        if "{mtp}" in template:
            for index in range(config.num_nextn_predict_layers):
                yield template.format(mtp=f"mtp.{index}")
        elif "{layer}" not in template:
            yield template
        else:
            kinds = [*config.layer_types, *["window"] * config.num_nextn_predict_layers]
            for index, (place, kind) in enumerate(zip(self._layers(), kinds, strict=True)):
                is_hashed = index < config.num_hash_layers
                has = {
                    "all": True,
                    "csa": kind == "csa",
                    "compressed": kind != "window",
                    "hashed": is_hashed,
                    "routed": not is_hashed,
                }
                if has[where]:
                    yield template.format(layer=place)

    def _parts(self, name: str) -> list[tuple[str, str]]:
        """Returns the parameter with each of the tensors that are joined into it."""
        for joined, parts in self.lists.joined.items():
            if f".{joined}." in name and ".experts." not in name:
                return [(name, part) for part in parts]
        return [(name, "")]

    def _place(self, official: str) -> tuple[str, str]:
        """Returns the parameter that a tensor is loaded into, and which of its parts it becomes."""
        name = self.lists.rename(official)
        for joined, parts in self.lists.joined.items():
            for part in parts if ".experts." not in name else []:
                candidate = name.replace(f".{part}.", f".{joined}.")
                if candidate != name and candidate in self._expected:
                    return candidate, part
        return name, ""

    def _wrong_formats(self, places: Mapping[str, tuple[str, str]]) -> Iterator[str]:
        """Yields what is wrong with dtypes, shapes and scales.

        `places`: the parameter and its part, by tensor. A server loads several names into one.
        """
        with torch.device("meta"):
            model = V4Model(self.config)
        official = to_official(named_tensors(model).items())
        shapes = {self._place(name): tuple(tensor.shape) for name, tensor in official}
        dtypes, sizes, scales, wrong_scales = [], [], [], []
        for name, place in places.items():
            header, dtype = self.headers[name], self._dtype(name, self._expected[place[0]])
            if (header.dtype if header.dtype in _QUANTISED else "") != dtype:
                dtypes.append(f"{name} ({header.dtype} instead of {dtype or 'BF16 or F32'})")
                continue
            shape = shapes[place]
            stored = (*shape[:-1], shape[-1] // 2) if dtype == "I8" else shape
            if header.shape != stored:
                sizes.append(f"{name} ({list(header.shape)} instead of {list(stored)})")
            if not dtype:
                continue
            scale = self.headers.get(f"{name.removesuffix('.weight')}.scale")
            if scale is None:
                scales.append(name)
            elif problem := _scale_problem(scale, shape, dtype):
                wrong_scales.append(f"{name} ({problem})")
        yield from _count("has", "tensor", "of another dtype than it expects", dtypes)
        yield from _count("has", "tensor", "of another shape than config.json describes", sizes)
        yield from _count("has", "quantised tensor", "without a scale", scales)
        yield from _count("has", "scale", "of another format", wrong_scales)

    def _dtype(self, name: str, is_quantised: bool) -> str:
        """Returns the dtype of a quantised tensor; "" for those that are not."""
        if not is_quantised:
            return ""
        is_fp4 = ".experts." in name and self.values.get("expert_dtype", "fp4") == "fp4"
        return "I8" if is_fp4 else "F8_E4M3"


def _scale_problem(scale: TensorHeader, shape: tuple[int, ...], dtype: str) -> str:
    rows, columns = shape
    expected: tuple[int, ...]
    if dtype == "I8":
        expected = (rows, columns // MXFP4_BLOCK)
    else:
        expected = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if scale.shape != expected:
        return f"{list(scale.shape)} instead of {list(expected)}"
    return "" if scale.dtype in ("F8_E8M0", "F32") else f"{scale.dtype} instead of F8_E8M0"


def _count(verb: str, noun: str, rest: str, names: Iterable[str]) -> Iterator[str]:
    """Yields one clause with the number of names and the first of them, if there are any."""
    if ordered := sorted(names):
        nouns = noun + "s" * (len(ordered) > 1)
        yield f"{verb} {len(ordered):,} {nouns} {rest}, the first is {ordered[0]}"


def check_command(folder: AnyPath) -> None:
    """Prints a line for each server, or for each of its problems.

    Raises ExportError where there are problems.
    """
    problems = check_folder(folder)
    for label, clauses in problems.items():
        for clause in clauses or ["finds every key and tensor"]:
            print(f"{label}: {clause}", flush=True)
    count = sum(map(len, problems.values()))
    if count:
        labels = " and ".join(label for label, clauses in problems.items() if clauses)
        plural = "s" * (count > 1)
        raise ExportError(f"{folder}: {count} problem{plural} for {labels}; see the lines above")
