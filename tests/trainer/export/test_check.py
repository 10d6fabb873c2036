"""`v4 export --check`: exports of all formats pass, and each fault is one clause with its count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4Config

from model import ModelConfig, V4Model
from model.hf import named_tensors, to_official
from tests.trainer.tiny import train
from trainer.commands import main
from trainer.config import load_config
from trainer.export.check import (
    _DERIVED,
    OFFICIAL_KEYS,
    _Comparison,
    check_folder,
    server_lists,
)
from trainer.export.export import export_run
from trainer.export.hf_folder import TensorHeader
from trainer.export.packed_weights import WeightFormat, config_keys, packed_outline

CONFIGS = Path(__file__).parents[3] / "configs"
FORMATS: tuple[WeightFormat, ...] = ("as_trained", "mxfp4_experts", "released")
SIZES = [
    *("model.hidden_size=128", "model.head_dim=512", "model.qk_rope_head_dim=64"),
    *("model.q_lora_rank=128", "model.o_lora_rank=128", "model.index_head_dim=128"),
    *("model.moe_intermediate_size=128", "model.num_nextn_predict_layers=1"),
]
NAMES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"}
FIRST = "layers.0.attn.wq_a"


@pytest.fixture(scope="module")
def exports(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export in each format."""
    folder = tmp_path_factory.mktemp("check")
    config = train(tiny, folder / "run", "steps=1", *SIZES)
    for weights in FORMATS:
        export_run(config, folder / weights, weights=weights)
    return folder


@pytest.mark.parametrize("weights", FORMATS)
def test_exports_have_what_servers_read(
    exports: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-export", str(exports / weights)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith(": finds every key and tensor") for line in lines)


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def with_keys(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        keys = json.loads((folder / "config.json").read_text())
        change(keys)
        (folder / "config.json").write_text(json.dumps(keys))

    return edit


def scale_of(tensors: dict[str, Tensor], rows: int) -> None:
    scale = tensors["layers.0.ffn.experts.0.w1.scale"]
    tensors["layers.0.ffn.experts.0.w1.scale"] = (
        scale.view(torch.uint8)[:rows].clone().view(scale.dtype)
    )


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        with_tensors(lambda t: [t.pop(f"{FIRST}.weight"), t.pop(f"{FIRST}.scale")]),
        "lacks 1 tensor that it needs, the first is model.layers.0.",
    ),
    "all of mtp": (
        with_tensors(lambda t: [t.pop(name) for name in [*t] if name.startswith("mtp.")]),
        "tensors that it needs, the first is mtp.0.",
    ),
    "unexpected": (
        with_tensors(lambda t: t.update({"layers.0.attn.wk.weight": torch.zeros(2)})),
        "has 1 tensor that it does not know, the first is layers.0.attn.wk.weight",
    ),
    "scale": (
        with_tensors(lambda t: [t.pop(f"{FIRST}.scale"), t.pop("layers.0.ffn.experts.0.w1.scale")]),
        f"has 2 quantised tensors without a scale, the first is {FIRST}.weight",
    ),
    "stray scale": (
        with_tensors(lambda t: t.update({"embed.scale": torch.zeros(2)})),
        "has 1 tensor that it does not know, the first is embed.scale",
    ),
    "scale's shape": (
        with_tensors(lambda t: scale_of(t, 3)),
        "has 1 scale of another format, the first is layers.0.ffn.experts.0.w1.weight ([3, 4] i",
    ),
    "dtype": (
        with_tensors(lambda t: t.update({f"{FIRST}.weight": torch.zeros(128, 128)})),
        f"has 1 tensor of another dtype than it expects, the first is {FIRST}.weight (F32 instea",
    ),
    "shape": (
        with_tensors(lambda t: t.update({"norm.weight": torch.zeros(5)})),
        "has 1 tensor of another shape than config.json describes, the first is norm.weight ([5]",
    ),
    "linears that are not FP8": (
        with_keys(lambda k: k["quantization_config"].update(modules_to_not_convert=["wq_b"])),
        "",
    ),
    "no quantisation": (
        with_keys(lambda k: k.pop("quantization_config")),
        "tensors of another dtype than it expects, the first is layers.0.attn.wkv.weight (F8_E4M3",
    ),
    "key": (
        with_keys(lambda k: [k.pop("hc_eps"), k.pop("topk_method")]),
        "config.json lacks 2 of its keys: hc_eps, topk_method",
    ),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_a_clause_with_its_count(
    exports: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, clause = FAULTS[name]
    folder = tmp_path / "folder"
    shutil.copytree(exports / "released", folder)
    edit(folder)
    assert main(["check-export", str(folder)]) == 2
    out, err = capsys.readouterr()
    for server in ("vLLM 0", "SGLang 0") if clause else ():
        assert [x for x in out.splitlines() if x.startswith(server) and clause in x], out
    assert err.splitlines()[-1].startswith(f"v4: error: {folder}: ")


def test_names_of_save_pretrained(exports: Path, tmp_path: Path) -> None:
    """Both servers take names with and without `model.`."""
    folder = tmp_path / "folder"
    shutil.copytree(exports / "released", folder)
    rename = lambda t: [  # noqa: E731
        t.update({f"model.{name}": t.pop(name)}) for name in [*t] if name.startswith("layers.")
    ]
    with_tensors(rename)(folder)
    assert main(["check-export", str(folder)]) == 0


def test_sizes_without_kernels(tiny: Path, tmp_path: Path) -> None:
    config = train(tiny, tmp_path / "run", "steps=1")
    export_run(config, tmp_path / "out")
    problems = check_folder(tmp_path / "out")
    (vllm,) = (clauses for label, clauses in problems.items() if label.startswith("vLLM"))
    assert [clause.split(" is ")[0] for clause in vllm] == ["head_dim", "index_head_dim"]


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-export", str(tmp_path)]) == 2
    assert "not a Hugging Face folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["check-export", str(tmp_path)]) == 2
    assert "holds neither model.safetensors nor" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nano", "flash", "pro"])
def test_names_of_the_shipped_models(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").model
    config = config.model_copy(update={"n_routed_experts": 8, "num_experts_per_tok": 2})
    with torch.device("meta"):
        outline = dict(to_official(named_tensors(V4Model(config)).items()))
    for weights in FORMATS:
        headers = {
            n: TensorHeader(NAMES.get(t.dtype, "F32"), tuple(t.shape))
            for n, t in packed_outline(outline, weights).items()
        }
        values = config.to_hf() | config_keys(config, weights)
        for lists in server_lists():
            assert lists.missing_keys(values) == []
            assert [*_Comparison(lists, config, values, headers).problems()] == []


def test_servers_leave_the_linears_of_packed_experts_alone() -> None:
    """And only those: the routed experts, and all linears of the released layout, are converted."""
    config = load_config(CONFIGS / "nano.yaml").model
    listed = config_keys(config, "mxfp4_experts")["quantization_config"]["modules_to_not_convert"]
    for lists in server_lists():
        linears = [name for name, (may_be, _) in lists.parameters.items() if may_be]
        modules = [
            n.removesuffix(".weight").format(layer="model.layers.1")
            for n in linears
            if "{mtp}" not in n
        ]
        assert len(modules) == 7
        skips = lists.skipped_modules(listed)
        assert [module for module in modules if not skips(module)] == []
        assert not skips(lists.rename("layers.1.ffn.experts."))


def test_what_vllm_reads_transformers_makes() -> None:
    """vLLM has no config of its own: it reads attributes of transformers' class."""
    keys = load_config(CONFIGS / "flash.yaml").model.to_hf()
    assert keys.keys() - {"architectures"} >= OFFICIAL_KEYS
    theirs = DeepseekV4Config(**keys)
    (vllm,) = (lists for lists in server_lists() if lists.server == "vLLM")
    read = [k for k in vllm.config_keys if k in OFFICIAL_KEYS or k in _DERIVED]
    assert len(read) > 30 and [key for key in read if not hasattr(theirs, key)] == []
    assert theirs.mlp_layer_types.count("hash_moe") == keys["num_hash_layers"]
    assert ModelConfig.from_hf(theirs.to_dict()) == ModelConfig.from_hf(keys)
