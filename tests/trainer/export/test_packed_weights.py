"""Packed experts out and in, judged by what `transformers` loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from model.kernels.mxfp4 import dequantise, quantise
from tests.model.tiny import tiny_config
from tests.trainer.tiny import saved_tensors, train
from trainer.config import RunConfig, load_config
from trainer.export.export import export_run
from trainer.export.hf_folder import read_hf_weights
from trainer.export.import_run import import_hf_folder
from trainer.export.packed_weights import config_keys, dequantised
from trainer.process.errors import ExportError

SIZES = ["model.hidden_size=32", "model.moe_intermediate_size=64", "precision=bf16"]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return train(tiny, tmp_path_factory.mktemp("run"), "steps=2", *SIZES)


@pytest.fixture(scope="module")
def packed(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "hf"
    export_run(run, folder, shard_bytes=20_000, weights="mxfp4_experts")
    return folder


def on_disk(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def rounded(run: RunConfig) -> dict[str, Tensor]:
    """The run's weights with the experts rounded to MXFP4."""
    saved = saved_tensors(run.run_dir / "checkpoints/step-00000002")
    weights = {n: t for n, t in saved.items() if not n.startswith("optim.")}
    for name in weights:
        if ".experts." in name:
            assert name.endswith(".weight")
            weights[name] = dequantise(quantise(weights[name].bfloat16()), torch.bfloat16)
    return weights


def test_the_folder_holds_packed_experts(packed: Path) -> None:
    tensors = on_disk(packed)
    codes, scales = (tensors[f"layers.0.ffn.experts.3.w1.{leaf}"] for leaf in ("weight", "scale"))
    assert codes.dtype == torch.int8 and codes.shape == (64, 16)
    assert scales.dtype == torch.float8_e8m0fnu and scales.shape == (64, 1)
    assert len(list(packed.glob("*.safetensors"))) > 2
    assert json.loads((packed / "config.json").read_text())["expert_dtype"] == "fp4"


def test_it_comes_back_as_the_rounded_weights(run: RunConfig, packed: Path) -> None:
    expected, actual = rounded(run), read_hf_weights(packed)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].float(), tensor.to(actual[name].dtype).float()), name


def test_export_of_an_import_is_the_same_folder(
    tiny: Path, run: RunConfig, packed: Path, tmp_path: Path
) -> None:
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}", *SIZES])
    import_hf_folder(config, packed)
    export_run(config, tmp_path / "again", weights="mxfp4_experts")
    first, second = read_hf_weights(packed), read_hf_weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_transformers_loads_the_same_numbers(run: RunConfig, packed: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    theirs, info = AutoModelForCausalLM.from_pretrained(
        packed,
        output_loading_info=True,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(dequantize=True),
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected, experts = rounded(run), theirs.model.layers[2].mlp.experts
    both = [expected[f"layers.2.ffn.experts.1.{name}.weight"] for name in ("w1", "w3")]
    assert torch.equal(experts.gate_up_proj[1], torch.cat(both))
    assert torch.equal(experts.down_proj[1], expected["layers.2.ffn.experts.1.w2.weight"])


def test_bad_sizes_and_missing_scales_are_named(
    tiny: Path, packed: Path, tmp_path: Path, run: RunConfig
) -> None:
    plain = train(tiny, tmp_path / "run", "steps=1")
    with pytest.raises(ExportError, match=r"model\.hidden_size is 24; .* a multiple of 32"):
        export_run(plain, tmp_path / "out", weights="mxfp4_experts")
    assert not (tmp_path / "out").exists()
    tensors = on_disk(packed)
    scale = tensors.pop("layers.0.ffn.experts.0.w1.scale")
    with pytest.raises(ExportError, match=r"w1\.weight is quantised, but .*w1\.scale is missing"):
        dequantised(tensors, "here")
    tensors["layers.0.ffn.experts.0.w1.scale"] = scale.view(torch.uint8)[:3].view(scale.dtype)
    with pytest.raises(ExportError, match=r"a scale of \(3, 1\) instead of \(64, 1\)"):
        dequantised(tensors, "here")


def test_scales_in_bytes_are_exponents_and_other_dtypes_are_refused(packed: Path) -> None:
    tensors = on_disk(packed)
    weight, scale = (f"layers.0.ffn.experts.0.w1.{leaf}" for leaf in ("weight", "scale"))
    pair = {weight: tensors[weight], scale: tensors[scale]}
    expected = dequantised(pair, "here")[weight]
    in_bytes = dequantised({**pair, scale: pair[scale].view(torch.uint8)}, "here")[weight]
    assert torch.equal(in_bytes, expected) and expected.abs().max() < 1
    for dtype in (torch.int32, torch.float32):
        wrong = {**pair, scale: pair[scale].float().to(dtype)}
        with pytest.raises(ExportError, match=r"scale in \w+; it should be float8_e8m0fnu$"):
            dequantised(wrong, "here")
    numbers = {"a.weight": torch.randn(128, 128).to(torch.float8_e4m3fn)}
    exponents = torch.full((1, 1), 125, dtype=torch.uint8)
    quarter = dequantised({**numbers, "a.scale": exponents}, "here")["a.weight"]
    assert torch.equal(quarter, numbers["a.weight"].bfloat16() / 4)


def test_fp8_weights_are_read_as_transformers_reads_them() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    numbers = torch.randn(256, 128).to(torch.float8_e4m3fn)
    for scales in (torch.tensor([[0.25], [4.0]]).to(torch.float8_e8m0fnu), torch.rand(2, 1)):
        ours = dequantised({"a.weight": numbers, "a.scale": scales}, "here")["a.weight"]
        theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, ours.dtype)
        assert torch.equal(ours, theirs)


RELEASED_RATIOS = {"csa_compress_ratio": 4, "hca_compress_ratio": 128}


def test_transformers_leaves_the_linears_of_packed_experts_alone() -> None:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = tiny_config(**RELEASED_RATIOS)
    keys = config.to_hf() | config_keys(config, "mxfp4_experts")
    listed = keys["quantization_config"]["modules_to_not_convert"]
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_hf()))
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) > 20
    assert [name for name in linears if should_convert_module(name, listed)] == []
    assert should_convert_module("model.layers.1.mlp.experts", listed)
