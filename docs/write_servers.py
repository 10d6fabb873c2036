"""Derives what vLLM and SGLang read from a Hugging Face folder: trainer/export/servers/*.json.

    pip download --no-deps --dest wheels vllm sglang
    python docs/write_servers.py wheels/*.whl

Their code is parsed, never run or copied: the lists hold names of parameters, renamings and keys of
config.json. A class, a function or a text that this file names and a new version lacks is an error.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "trainer/export/servers"
LINEARS = ("Linear", "VocabParallelEmbedding", "ParallelLMHead")
PARAMETERS = ("Parameter", "make_attention_sink", "make_hc_mixing_params", "make_hc_head_params")


@dataclass(frozen=True)
class Part:
    """A class whose parameters are those below `prefix`, in the layers of `where`.

    Without a prefix it is a class or a function that only reads keys of config.json.
    """

    prefix: str | None
    file: str
    name: str
    where: str = "all"
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """The places in a server's wheel of what it reads.

    Attributes:
        name: as written in messages.
        parts: classes with parameters.
        more: parameters that no class of `parts` creates itself, with the layers that have them.
        joined: parameters of several tensors that the loader's code joins, next to its table.
        experts: names of an expert's three matrices.
        scales: ends of the names of scales, of linears and of experts.
        loader: file and function with the loader, which has the texts `spelled`.
    """

    name: str
    parts: tuple[Part, ...]
    more: tuple[tuple[str, str], ...]
    joined: dict[str, list[str]]
    experts: tuple[str, str, str]
    scales: dict[str, str]
    loader: tuple[str, str]
    spelled: tuple[str, ...]
    limits: dict[str, list[int]] = field(default_factory=dict)


VLLM_MODEL, VLLM_MTP = "nvidia/model.py", "nvidia/mtp.py"
_NO_VISION = ("gate.bias_vl",)
VLLM = Server(
    "vLLM",
    tuple(
        Part(prefix, f"vllm/models/deepseek_v4/{file}", name, *more)
        for prefix, file, name, *more in (
            ("", VLLM_MODEL, "DeepseekV4ForCausalLM"),
            ("model.", VLLM_MODEL, "DeepseekV4Model"),
            ("{layer}.", VLLM_MODEL, "DeepseekV4DecoderLayer"),
            ("{layer}.attn.", "attention.py", "DeepseekV4Attention"),
            ("{layer}.attn.compressor.", "compressor.py", "DeepseekCompressor", "compressed"),
            ("{layer}.attn.indexer.", "attention.py", "DeepseekV4Indexer", "csa"),
            ("{layer}.attn.indexer.compressor.", "compressor.py", "DeepseekCompressor", "csa"),
            ("{layer}.ffn.", VLLM_MODEL, "DeepseekV4MoE", "all", _NO_VISION),
            ("{layer}.ffn.shared_experts.", VLLM_MODEL, "DeepseekV4MLP"),
            ("{mtp}.", VLLM_MTP, "DeepSeekV4MultiTokenPredictorLayer"),
            (None, VLLM_MTP, "DeepSeekV4MultiTokenPredictor"),
            (None, "common/rope.py", "build_deepseek_v4_rope"),
            (None, "quant_config.py", "DeepseekV4FP8Config"),
        )
    ),
    (("{mtp}.norm.weight", "all"),),
    {},
    ("w1", "w2", "w3"),
    {"linear": "weight_scale_inv", "expert": "weight_scale"},
    ("vllm/models/deepseek_v4/nvidia/model.py", "_make_deepseek_v4_weights_mapper"),
    (r"(\.experts\.\d+\.w[123])\.scale$", r"\1.weight_scale", ".weight_scale_inv", "mtp."),
    {"head_dim": [512], "index_head_dim": [128]},
)
SGLANG_MODEL = "sglang/srt/models/deepseek_v4.py"
_V2 = "sglang/srt/models/deepseek_v2.py"
_COMPRESSOR = "sglang/srt/layers/attention/dsv4/compressor.py"
_INDEXER = "sglang/srt/layers/attention/dsv4/indexer.py"
_UTILS = "sglang/srt/utils/hf_transformers/common"
_NO_IMAGES = ("image_start", "image_end", "image_newline")
SGLANG = Server(
    "SGLang",
    (
        Part("", SGLANG_MODEL, "DeepseekV4ForCausalLM", "all", _NO_IMAGES),
        Part("model.", SGLANG_MODEL, "DeepseekV4Model"),
        Part("{layer}.", SGLANG_MODEL, "DeepseekV4DecoderLayerBase"),
        Part("{layer}.self_attn.", SGLANG_MODEL, "MqaAttentionBase", "all", ("wq_a", "wkv")),
        Part("{layer}.self_attn.compressor.", _COMPRESSOR, "Compressor", "compressed"),
        Part("{layer}.self_attn.indexer.", _INDEXER, "C4Indexer", "csa"),
        Part("{layer}.self_attn.indexer.compressor.", _COMPRESSOR, "Compressor", "csa"),
        Part("{layer}.mlp.", _V2, "DeepseekV2MoE"),
        Part("{layer}.mlp.gate.", _V2, "MoEGate", "all", ("e_score_correction_bias_vl",)),
        Part("{layer}.mlp.shared_experts.", _V2, "DeepseekV2MLP"),
        Part(
            "{mtp}.",
            "sglang/srt/models/deepseek_v4_nextn.py",
            "DeepseekV4ModelNextN",
            "all",
            ("embed_tokens", "shared_head.norm"),
        ),
        Part(None, f"{_UTILS}.py", "get_rope_config"),
    ),
    (("{layer}.mlp.topk.tid2eid", "hashed"), ("{mtp}.norm.weight", "all")),
    {"wqkv_a": ["wq_a", "wkv"], "wkv_gate": ["wkv", "wgate"]},
    ("gate_proj", "down_proj", "up_proj"),
    {"linear": "weight_scale_inv", "expert": "weight_scale_inv"},
    (SGLANG_MODEL, "remap_weight_name_to_dpsk_hf_format"),
    ("model.embed_tokens.", "lm_head.", "model.norm.weight", "hc_head_", ".weight_scale_inv"),
)
SERVERS = {"vllm": VLLM, "sglang": SGLANG}
WHERE = {"tid2eid": "hashed", "e_score_correction_bias": "routed"}
"""Layers that have a parameter, by the end of its name."""


class Wheel:
    """The source files of a wheel."""

    def __init__(self, path: Path) -> None:
        self.package, self.version = path.name.split("-")[:2]
        self._zip = zipfile.ZipFile(path)

    def tree(self, file: str) -> ast.Module:
        """Returns a file, parsed. Raises KeyError where there is none."""
        return ast.parse(self._zip.read(file))

    def definition(self, file: str, name: str) -> Any:
        """Returns a class or a function. Raises SystemExit where there is none."""
        for node in ast.walk(self.tree(file)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
        raise SystemExit(f"{self.package} {self.version}: {file} has no {name}")


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yields assignments of a class to attributes of `self`, and to attributes of these."""
    for child in ast.walk(node):
        if isinstance(child, ast.Assign):
            targets, value = child.targets, child.value
        elif isinstance(child, ast.AnnAssign) and child.value is not None:
            targets, value = [child.target], child.value
        else:
            continue
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                path = ast.unparse(one)
                if path.startswith("self.") and "[" not in path:
                    yield path.removeprefix("self."), value


def _calls(value: ast.expr) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(value):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).rpartition(".")[2], node


def _parameters(wheel: Wheel, part: Part) -> Iterator[tuple[str, bool, str]]:
    """Yields name, whether it may be quantised, and the layers, of a class's own parameters."""
    for attribute, value in _assigned(wheel.definition(part.file, part.name)):
        if attribute in part.without:
            continue
        where = WHERE.get(attribute.rpartition(".")[2], part.where)
        for called, call in _calls(value):
            if called.endswith(LINEARS):
                settings = {k.arg: k.value for k in call.keywords}.get("quant_config")
                # An embedding, a head and the projections of a compressor are quantised in formats
                # of others alone.
                plain = settings is None or isinstance(settings, ast.Constant)
                plain |= "expert_pack" in ast.unparse(settings) if settings is not None else False
                plain |= not called.endswith("Linear") or attribute == "weights_proj"
                plain |= "compressor." in str(part.prefix)
                yield f"{part.prefix}{attribute}.weight", not plain, where
            elif called == "RMSNorm":
                yield f"{part.prefix}{attribute}.weight", False, where
            elif called in PARAMETERS:
                yield f"{part.prefix}{attribute}", False, where


def _config_keys(wheel: Wheel, part: Part) -> Iterator[str]:
    """Yields the keys of config.json that a class reads: `config.KEY`, `getattr(config, "KEY")`."""
    for node in ast.walk(wheel.definition(part.file, part.name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "config":
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and ast.unparse(node.args[0]).endswith("config")
        ):
            yield ast.literal_eval(node.args[1])


def _vllm_renames(function: ast.FunctionDef) -> list[list[str]]:
    """Returns the mapper of FP4 experts as [pattern, replacement] in the order of its use."""
    tables: dict[str, ast.Dict] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Dict):
            tables[str(node.arg)] = node.value
    substrings, prefixes, suffixes = (
        {
            ast.literal_eval(k): ast.literal_eval(v)
            for k, v in zip(t.keys, t.values, strict=True)
            if k
        }
        for t in (tables[f"orig_to_new_{kind}"] for kind in ("substr", "prefix", "suffix"))
    )
    escaped = lambda text: text.replace(".", r"\.")  # noqa: E731
    renames = [[r"(\.experts\.\d+\.w[123])\.scale$", r"\1.weight_scale"]]
    renames += [[r"\.scale$", ".weight_scale_inv"]]
    renames += [[escaped(old), new] for old, new in substrings.items() if new is not None]
    renames += [["^" + escaped(old), new] for old, new in prefixes.items() if old != "mtp."]
    return renames + [[escaped(old) + "$", new] for old, new in suffixes.items()]


def _sglang_renames(function: ast.FunctionDef) -> list[list[str]]:
    """Returns the remapping of the main model as [pattern, replacement] in the order of its use."""
    renames = [
        [r"^embed\.", "model.embed_tokens."],
        [r"^head\.", "lm_head."],
        [r"^norm\.weight$", "model.norm.weight"],
        [r"^hc_head_", "model.hc_head_"],
        [r"^layers\.", "model.layers."],
    ]
    for node in ast.walk(function):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        call = node.value
        if ast.unparse(node.targets[0]) == "name" and ast.unparse(call.func) == "name.replace":
            old, new = (ast.literal_eval(argument) for argument in call.args)
            renames.append([old.replace(".", r"\."), new])
    return [*renames, [r"(self_attn|mlp|_proj)(.*)\.scale$", r"\1\2.weight_scale_inv"]]


def _joined(wheel: Wheel, server: Server) -> dict[str, list[str]]:
    """Returns the parameters that several tensors are loaded into, and the names of these."""
    joined = {name: list(parts) for name, parts in server.joined.items()}
    for node in ast.walk(wheel.tree(server.loader[0])):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        is_table = ast.unparse(target).lower().endswith("stacked_params_mapping")
        if is_table and isinstance(node.value, ast.List):
            for name, part, _ in ast.literal_eval(node.value):
                parts = joined.setdefault(name.rpartition(".")[2], [])
                if (leaf := part.rpartition(".")[2]) not in parts:
                    parts.append(leaf)
    return joined


def derive(wheel: Wheel) -> dict[str, Any]:
    """Returns what one server reads."""
    server = SERVERS[wheel.package]
    function = wheel.definition(*server.loader)
    texts = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant)}
    if lacking := [text for text in server.spelled if text not in texts]:
        raise SystemExit(f"{wheel.package} {wheel.version}: {server.loader} lacks {lacking}")
    renames = _vllm_renames if wheel.package == "vllm" else _sglang_renames
    parameters = {
        name: [quantised, where]
        for part in server.parts
        if part.prefix is not None
        for name, quantised, where in _parameters(wheel, part)
    }
    parameters |= {name: [False, where] for name, where in server.more}
    return {
        "server": server.name,
        "version": wheel.version,
        "files": sorted({part.file for part in server.parts} | {server.loader[0]}),
        "config_keys": sorted({k for part in server.parts for k in _config_keys(wheel, part)}),
        "limits": server.limits,
        "renames": renames(function),
        "joined": _joined(wheel, server),
        "experts": list(server.experts),
        "scales": server.scales,
        "parameters": parameters,
    }


def main(paths: list[str]) -> None:
    """Writes a file for each wheel."""
    for path in paths:
        wheel = Wheel(Path(path))
        out = OUT / f"{wheel.package}.json"
        out.write_text(json.dumps(derive(wheel), indent=1) + "\n")
        print(f"wrote {out}: {wheel.package} {wheel.version}")


if __name__ == "__main__":
    main(sys.argv[1:])
