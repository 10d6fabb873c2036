"""The released layout out and in: its list of formats, identical bytes, transformers' numbers."""

import filecmp
import json
import re
from pathlib import Path

import pytest
import torch

from model import SampleLayout, V4Model
from model.hf import to_transformers
from model.kernels.fp8.naive import naive_quantise_dequantise
from model.kernels.mxfp4 import naive_quantise_dequantise as naive_mxfp4
from tests.trainer.export.test_packed_weights import on_disk
from tests.trainer.tiny import saved_tensors, train
from trainer.commands import main
from trainer.config import RunConfig, load_config
from trainer.export.export import export_run
from trainer.export.hf_folder import read_hf_config, read_hf_weights
from trainer.export.import_run import import_hf_folder
from trainer.export.packed_weights import _pack_fp8, _pack_mxfp4, dequantised
from trainer.process.errors import ExportError

SIZES = [
    "model.hidden_size=128",
    "model.head_dim=128",
    "model.qk_rope_head_dim=64",
    "model.q_lora_rank=256",
    "model.o_lora_rank=128",
    "model.index_head_dim=64",
    "model.index_topk=16",  # selects all entries: of equal scores either model may drop another
    "model.moe_intermediate_size=128",
    "model.num_nextn_predict_layers=1",
]
# Of the released files: dtypes by name, and the shapes of scales as fractions of the weights'.
RELEASED = [
    (r"ffn\.experts\.\d+\.w[123]\.weight", torch.int8),
    (
        r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]"
        r"|[eh]_proj)\.weight",
        torch.float8_e4m3fn,
    ),
    (r".*\.scale", torch.float8_e8m0fnu),
    (r".*(hc_(attn|ffn|head)_(fn|base|scale)|ape|attn_sink|gate\.bias)", torch.float32),
    (r"ffn\.gate\.tid2eid", torch.int64),
    (r"(embed|head|ffn\.gate|.*norm|.*\.(wkv|wgate)|attn\.indexer\.weights_proj)\.weight", "bf16"),
]
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    precision = f"precision={request.param}"
    return train(tiny, tmp_path_factory.mktemp("run"), "steps=2", *SIZES, precision)


@pytest.fixture(scope="module")
def released(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "hf"
    export_run(run, folder, shard_bytes=100_000, weights="released")
    return folder


def test_every_tensor_has_the_releases_format(released: Path) -> None:
    tensors = on_disk(released)
    for name, tensor in tensors.items():
        rest = re.sub(r"^(layers|mtp)\.\d+\.", "", name)
        dtype = next(dtype for pattern, dtype in RELEASED if re.fullmatch(pattern, rest))
        assert tensor.dtype == (torch.bfloat16 if dtype == "bf16" else dtype), name
        if name.endswith(".scale"):
            weight = tensors[name.removesuffix("scale") + "weight"]
            block = (1, 16) if weight.dtype == torch.int8 else (128, 128)
            assert [s * b for s, b in zip(tensor.shape, block, strict=True)] == [*weight.shape]
    scales = {n.removesuffix(".scale") for n in tensors if n.endswith(".scale")}
    packed = {n.removesuffix(".weight") for n, t in tensors.items() if t.element_size() == 1}
    assert scales == {name.removesuffix(".scale") for name in packed}
    config = json.loads((released / "config.json").read_text())
    assert config["quantization_config"] == QUANTISATION and config["expert_dtype"] == "fp4"
    assert config["torch_dtype"] == "bfloat16"


def test_weights_are_rounded_as_the_formats_say(run: RunConfig, released: Path) -> None:
    saved = saved_tensors(run.run_dir / "checkpoints/step-00000002")
    masters = {n: tensor for n, tensor in saved.items() if not n.startswith("optim.")}
    actual, formats = read_hf_weights(released), on_disk(released)
    assert masters.keys() == actual.keys()
    for name, master in masters.items():
        trained = master.bfloat16() if run.precision == "bf16" else master
        if formats[name].dtype == torch.float8_e4m3fn:
            expected = naive_quantise_dequantise(trained, 128, 128)
        elif formats[name].dtype == torch.int8:
            expected = naive_mxfp4(trained)
        else:
            expected = master.to(formats[name].dtype)
        assert torch.equal(actual[name].float(), expected.float()), name


def test_export_of_an_import_has_the_same_bytes(
    tiny: Path, run: RunConfig, released: Path, tmp_path: Path
) -> None:
    other = {"fp32": "bf16", "bf16": "fp32"}[run.precision]
    overrides = [f"run_dir={tmp_path / 'run'}", f"precision={other}", *SIZES]
    config = load_config(tiny, overrides)
    import_hf_folder(config, released)
    again = load_config(tmp_path / "run/config.yaml", overrides)
    export_run(again, tmp_path / "again", shard_bytes=100_000, weights="released")
    names = sorted(path.name for path in released.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert filecmp.cmpfiles(released, tmp_path / "again", names, shallow=False)[0] == names


def test_packing_what_was_unpacked_gives_the_same_bytes() -> None:
    """Also where rounding leaves a largest number that half the scale reaches."""
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    x[:128, :128] *= 225 / x[:128, :128].abs().max()  # to 224 times 1, or 448 times a half
    x[-1, :32] *= 3.2 / x[-1, :32].abs().max()  # to 3 times 1, or 6 times a half
    for pack in (_pack_fp8, _pack_mxfp4):
        codes, scales = pack(x)
        numbers = dequantised({"a.weight": codes, "a.scale": scales}, "here")["a.weight"]
        again, same_scales = pack(numbers)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(same_scales.view(torch.uint8), scales.view(torch.uint8))


def test_transformers_computes_the_same_logits(released: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs, info = AutoModelForCausalLM.from_pretrained(
        released, output_loading_info=True, dtype=torch.bfloat16
    )
    theirs = theirs.float().eval()  # bf16 represents every number of the folder exactly
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ours = V4Model(read_hf_config(released), torch.float32)
    ours.load_hf_state_dict(read_hf_weights(released))
    loaded = theirs.state_dict()
    for name, tensor in to_transformers(ours.state_dict()).items():
        assert name.startswith("mtp.") or torch.equal(loaded[name], tensor.to(loaded[name].dtype))
    tokens = torch.randint(0, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(tokens, use_cache=False).logits
        own = ours(tokens, SampleLayout.from_lengths([[40]])).logits
    # Sums of fp32 products in another order.
    torch.testing.assert_close(own.view_as(logits), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.hidden_size=160", r"layers\.0\.attn\.wq_a\.weight has matrices of 256 x 160"),
        ("model.o_lora_rank=64", r"layers\.0\.attn\.wo_a\.weight has matrices of 64 x 128"),
    ],
)
def test_sizes_that_cut_a_block_are_refused(
    tiny: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    config = load_config(tiny, [*SIZES, override, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ExportError, match=f"{sentence}; .* multiples of 128; use --weights"):
        export_run(config, tmp_path / "out", weights="released")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_layout(run: RunConfig, released: Path, tmp_path: Path) -> None:
    command = ["export", str(run.run_dir / "config.yaml"), str(tmp_path / "out")]
    assert main([*command, "--weights=released"]) == 0
    expected, tensors = on_disk(released), on_disk(tmp_path / "out")
    assert expected.keys() == tensors.keys()
    assert all(expected[name].dtype == tensor.dtype for name, tensor in tensors.items())
