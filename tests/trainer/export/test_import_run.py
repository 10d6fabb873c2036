"""Export to and import from Hugging Face folders."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import Tokenizer
from tests.full_disk import full_disk
from tests.trainer.tiny import column, saved_tensors, train
from trainer.config import RunConfig, load_config
from trainer.export.export import export_run
from trainer.export.hf_folder import read_hf_weights, write_hf_folder
from trainer.export.import_run import import_hf_folder, open_run
from trainer.export.sample import sample_text
from trainer.parallel.grid import Grid
from trainer.process.errors import CheckpointError, ExportError


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return train(tiny, tmp_path_factory.mktemp("run"), "steps=4", "model.mtp_loss_weight=0.2")


@pytest.fixture(scope="module")
def exported(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_run(run, folder)
    return folder


def transformers_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


def test_transformers_loads_it_and_computes_the_same(run: RunConfig, exported: Path) -> None:
    theirs, info = transformers_model(exported)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = open_run(run, Grid.single())[0].model
    # At 19 tokens a query sees at most the top-k of 4 entries. Beyond that, scores that are equal
    # (often 0 with 2 index heads) are told apart by their place here and by chance there.
    tokens = torch.randint(3, 400, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=2e-5, atol=2e-5)
    assert theirs.generation_config.eos_token_id == run.model.eos_token_id


def test_its_tokenizer_gives_the_same_ids(run: RunConfig, exported: Path) -> None:
    from transformers import AutoTokenizer

    text = "abc  def\n\tgh é <｜User｜> 漢字"
    theirs = AutoTokenizer.from_pretrained(exported)
    ids = Tokenizer(run.data.tokenizer.path).encode(text, allow_special=True)
    assert theirs.encode(text) == ids
    assert theirs.model_max_length == run.model.max_position_embeddings


def test_generation_as_released(exported: Path) -> None:
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings == {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    assert "pad_token_id" not in json.loads((exported / "config.json").read_text())


def test_transformers_writes_text(exported: Path) -> None:
    result = sample_text(exported, "abc", new_tokens=4)
    assert result["text"].startswith("abc") and result["parameters"] > 10_000


def test_a_sample_continues_the_beginning_of_a_document(run: RunConfig, exported: Path) -> None:
    """The trainer's documents begin with bos, which the tokenizer's files no longer add."""
    ours, tokenizer = open_run(run, Grid.single())[0].model, Tokenizer(run.data.tokenizer.path)
    ids = [tokenizer.bos_id, *tokenizer.encode("abc")]
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(ours(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = "".join(tokenizer.decode([i]) for i in ids if i > 2)
    assert sample_text(exported, "abc", new_tokens=3)["text"] == expected


def test_sample_refuses_a_folder_with_a_weight_missing(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(exported, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    del weights["layers.0.attn.wkv.weight"]
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="missing_keys"):
        sample_text(tmp_path / "hf", "abc")


def test_several_shards_with_an_index(run: RunConfig, exported: Path, tmp_path: Path) -> None:
    weights = read_hf_weights(exported)
    tokenizer = Tokenizer(run.data.tokenizer.path)
    write_hf_folder(tmp_path / "hf", run.model, weights, tokenizer, "float32", shard_bytes=20_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert len(set(index["weight_map"].values())) > 3
    again = read_hf_weights(tmp_path / "hf")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    _, info = transformers_model(tmp_path / "hf")
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object"),
        ('{"weight_map": 3}', "is not an index"),
        ('{"weight_map": {"norm.weight": ["a"]}}', "is not an index"),
        ('{"weight_map": {"norm.weight": "../a"}}', "weight_map: '../a' should be a relative"),
        ('{"weight_map": {"norm.weight": "/a"}}', "weight_map: '/a' should be a relative path"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ExportError, match=rf"index\.json: {message}"):
        read_hf_weights(tmp_path)


def test_files_and_index_that_contradict_each_other(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    names = list(read_hf_weights(folder))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"

    def write(*listed: str) -> None:
        file = "model-00001-of-00001.safetensors"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(listed, file)}))

    write(*names)
    assert [*read_hf_weights(folder)] == names
    write(*(name for name in names if name != "norm.weight"))
    with pytest.raises(ExportError, match=r"safetensors: holds norm\.weight, contrary to"):
        read_hf_weights(folder)
    write(*names, "a.weight")
    with pytest.raises(ExportError, match=r"safetensors: lacks a\.weight, contrary to"):
        read_hf_weights(folder)
    shutil.copy(exported / "model.safetensors", folder)
    with pytest.raises(ExportError, match=r"holds both model\.safetensors and .*; delete one"):
        read_hf_weights(folder)


def test_a_folder_or_file_that_is_no_model(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ExportError, match=r"tiny\.yaml: not a Hugging Face folder"):
        import_hf_folder(config, tiny)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ExportError, match=r"config\.json: should hold a JSON object, not a list"):
        import_hf_folder(config, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_import_has_all_weights_and_trains_on(
    tiny: Path, run: RunConfig, exported: Path, tmp_path: Path, precision: str
) -> None:
    overrides = [f"run_dir={tmp_path}", f"precision={precision}"]
    import_hf_folder(load_config(tiny, [*overrides, "steps=3"]), exported)
    imported = saved_tensors(tmp_path / "checkpoints/step-00000000")
    original = saved_tensors(run.run_dir / "checkpoints/step-00000004")
    for name, tensor in original.items():
        if not name.startswith("optim."):
            tolerance = 0.0 if precision == "fp32" else 2**-8
            torch.testing.assert_close(imported[name], tensor, rtol=tolerance, atol=0.0)
    assert imported["optim.momentum.layers.0.attn.wq_a.weight"].abs().sum() == 0
    train(tmp_path / "config.yaml", tmp_path)
    fresh, trained = column(tmp_path, "lm_loss"), column(run.run_dir, "lm_loss")
    assert fresh[0] < trained[0] - 0.01, "it started from trained weights"


def test_an_import_of_what_transformers_saves(
    tiny: Path, run: RunConfig, exported: Path, tmp_path: Path
) -> None:
    theirs, _ = transformers_model(exported)
    theirs.save_pretrained(tmp_path / "hf")
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}"])
    assert "mtp.* was not in the folder" in import_hf_folder(config, tmp_path / "hf")
    imported = saved_tensors(tmp_path / "run/checkpoints/step-00000000")
    original = saved_tensors(run.run_dir / "checkpoints/step-00000004")
    names = [name for name in original if not name.startswith(("optim.", "mtp."))]
    assert all(torch.equal(imported[name], original[name]) for name in names)


def test_an_import_without_the_folder_s_mtp(tiny: Path, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"num_nextn_predict_layers": 0}))
    overrides = [f"run_dir={tmp_path / 'run'}", "model.num_nextn_predict_layers=0"]
    assert "without the folder's mtp.*" in import_hf_folder(load_config(tiny, overrides), folder)


def test_mistakes_are_sentences(tiny: Path, run: RunConfig, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="already exists"):
        export_run(run, exported)
    with pytest.raises(ExportError, match=r"already holds step-00000004"):
        import_hf_folder(run, exported)
    lost = load_config(tiny, [f"run_dir={tmp_path / 'lost'}"])
    lost.run_dir.mkdir()
    (lost.run_dir / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    with pytest.raises(ExportError, match="lost: has metrics of 4 steps; name a new run_dir"):
        import_hf_folder(lost, exported)
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        export_run(config, tmp_path / "out")
    with pytest.raises(ExportError, match=r"no config\.json"):
        import_hf_folder(config, tmp_path)
    shutil.copytree(exported, tmp_path / "cut")
    with (tmp_path / "cut/model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ExportError, match="truncated"):
        import_hf_folder(config, tmp_path / "cut")
    shutil.copytree(exported, tmp_path / "nan")
    for value in (math.nan, -math.inf):
        weights = load_file(exported / "model.safetensors")
        weights["embed.weight"][7, 3] = value
        save_file(weights, tmp_path / "nan/model.safetensors", {"format": "pt"})
        with pytest.raises(ExportError, match=r"nan: embed\.weight has values that are NaN or"):
            import_hf_folder(config, tmp_path / "nan")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(run: RunConfig, tmp_path: Path) -> None:
    with full_disk(30_000), pytest.raises(ExportError, match="cannot be written"):
        export_run(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
