"""One fact in two places: sizes, ids of special tokens and the vocabulary of a folder and a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from data import Tokenizer
from data.errors import DataError
from tests.trainer.tiny import saved_tensors, train
from trainer.commands import main
from trainer.config import ConfigError, RunConfig, load_config
from trainer.export.export import export_run
from trainer.export.import_run import import_hf_folder
from trainer.process.errors import ExportError


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return train(tiny, tmp_path_factory.mktemp("run"), "steps=1")


@pytest.fixture(scope="module")
def exported(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_run(run, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_sizes(tiny: Path, folder: Path, **model: Any) -> Path:
    """The tiny config whose model has these fields alone."""
    values = yaml.safe_load(tiny.read_text()) | {"model": model}
    values["optim"]["learning_rate"] = 3e-3  # PyYAML reads 3e-3 as text
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def assert_refused(config: RunConfig, folder: Path, message: str) -> None:
    with pytest.raises((ExportError, ConfigError), match=message) as caught:
        import_hf_folder(config, folder)
    assert "\n" not in str(caught.value)
    assert not (config.run_dir / "checkpoints").exists()


def test_a_config_without_sizes_takes_the_folder_s(
    tiny: Path, run: RunConfig, folder: Path, tmp_path: Path
) -> None:
    path = without_sizes(tiny, tmp_path, balance_loss_weight=0.5, hidden_size=24)
    arguments = ["import", str(path), str(folder), f"run_dir={tmp_path / 'new'}"]
    assert main(arguments) == 0
    imported = load_config(tmp_path / "new/config.yaml").model
    expected = {"balance_loss_weight": 0.5, "initializer_range": 0.006}
    assert imported == run.model.model_copy(update=expected)
    assert len(saved_tensors(tmp_path / "new/checkpoints/step-00000000")) > 100


def test_explicit_sizes_that_the_folder_contradicts(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = without_sizes(tiny, tmp_path, hc_mult=4)
    arguments = ["import", str(path), str(folder), f"run_dir={tmp_path / 'new'}"]
    assert main([*arguments, "model.hidden_size=32"]) == 2
    line = capsys.readouterr().err
    assert "model.hidden_size = 32 should be 24, model.hc_mult = 4 should be 2" in line
    assert line.count("\n") == 1 and not (tmp_path / "new/checkpoints").exists()
    # What does not fit the other sections is a mistake as in any config.
    assert main([*arguments, "data.seq_len=5000"]) == 2
    assert "model.max_position_embeddings = 4096" in capsys.readouterr().err


def test_every_contradiction_counts_but_of_training_settings(
    tiny: Path, folder: Path, tmp_path: Path
) -> None:
    changes = ["head_dim=32", "q_lora_rank=8", "o_lora_rank=4", "index_topk=2", "hc_mult=3"]
    free = ["balance_loss_weight=0.5", "initializer_range=0.3", "hc_init_scale=0.5"]
    overrides = [f"model.{change}" for change in [*changes, "sliding_window=9", *free]]
    config = load_config(tiny, [f"run_dir={tmp_path / 'new'}", *overrides])
    assert_refused(config, folder, r"model\.index_topk = 2 should be 4 \(and 1 more\)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": 1}, r"bos_token_id = 1 should be 0, as in config\.json"),
        ({"eos_token_id": [3, 4]}, r"eos_token_id = \[3, 4\] should be 1"),
        ({"eos_token_id": [1, 1000]}, r"eos_token_id = \[1, 1000\] should be below the vocab_size"),
        ({"pad_token_id": -1}, r"pad_token_id = -1 should be below the vocab_size = 400"),
        ({"eos_token_id": [1, 4], "pad_token_id": 1}, None),
        ({"eos_token_id": None}, None),
    ],
    ids=str,
)
def test_ids_of_generation_config(
    tiny: Path, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    edit(folder / "generation_config.json", **changes)
    config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
    if message is None:
        assert import_hf_folder(config, folder).startswith("wrote ")
    else:
        assert_refused(config, folder, message)


def test_a_damaged_generation_config(tiny: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
    assert_refused(config, folder, r"generation_config\.json: is not valid JSON")


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_ids_of_config_json_that_the_tokenizer_has_not(
    tiny: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    for file in ("config.json", "generation_config.json"):
        edit(folder / file, **{name: 7})
    config = load_config(tiny, [f"run_dir={tmp_path / 'new'}", f"model.{name}=7"])
    assert_refused(config, folder, rf"model\.{name} = 7 should be [01], as in the tokenizer in")


class TestTokenizerInTheFolder:
    def test_the_same_in_another_file(self, tiny: Path, folder: Path, tmp_path: Path) -> None:
        (folder / "tokenizer.model").unlink()  # the JSON alone, as in the released folders
        config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
        assert Tokenizer(folder).hash != Tokenizer(config.data.tokenizer.path).hash
        assert import_hf_folder(config, folder).startswith("wrote ")

    def test_none(self, tiny: Path, folder: Path, tmp_path: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
        assert import_hf_folder(config, folder).startswith("wrote ")

    @pytest.mark.parametrize("change", ["vocabulary", "merges", "special", "normalizer"])
    def test_another(self, tiny: Path, folder: Path, tmp_path: Path, change: str) -> None:
        (folder / "tokenizer.model").unlink()
        path = folder / "tokenizer.json"
        spec = json.loads(path.read_text())
        vocab = spec["model"]["vocab"]
        if change == "vocabulary":
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
            message = r"'[ab]' is \d+ there and \d+ here; set data\.tokenizer\.path to"
        elif change == "merges":
            spec["model"]["merges"].reverse()
            message = "the part `model` of their tokenizer.json differs"
        elif change == "special":
            spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<think>"]
            message = "they mark other tokens as special"
        else:
            spec["normalizer"] = {"type": "NFC"}
            message = "the part `normalizer` of their tokenizer.json differs"
        path.write_text(json.dumps(spec))
        config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
        assert_refused(config, folder, message)

    def test_two_files_that_differ(self, tiny: Path, folder: Path, tmp_path: Path) -> None:
        path = folder / "tokenizer.json"
        spec = json.loads(path.read_text())
        spec["model"]["merges"].reverse()
        path.write_text(json.dumps(spec))
        config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
        assert_refused(config, folder, r"hf/tokenizer\.json: is another tokenizer than")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"eos_token": "<|EOT|>"}, r"eos_token = '<\|EOT\|>' should be '<｜end"),
            ({"bos_token": {"content": "<think>"}}, "bos_token = '<think>' should be '<｜begin"),
            ({"pad_token": "x"}, "pad_token = 'x' should be a special token of the tokenizer"),
            ({"pad_token": {"content": "<think>"}, "bos_token": None}, None),
        ],
        ids=str,
    )
    def test_tokens_of_its_config(
        self, tiny: Path, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
    ) -> None:
        edit(folder / "tokenizer_config.json", **changes)
        config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
        if message is None:
            assert import_hf_folder(config, folder).startswith("wrote ")
        else:
            assert_refused(config, folder, rf"tokenizer_config\.json: {message}")

    def test_a_damaged_one(self, tiny: Path, folder: Path, tmp_path: Path) -> None:
        (folder / "tokenizer.model").write_bytes(b"?")
        config = load_config(tiny, [f"run_dir={tmp_path / 'new'}"])
        with pytest.raises(DataError, match=r"tokenizer\.model is damaged"):
            import_hf_folder(config, folder)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_run_whose_model_has_other_ids_than_its_tokenizer(
    tiny: Path, run: RunConfig, tmp_path: Path, name: str
) -> None:
    message = rf"model\.{name} = 9 should be \d, as in the tokenizer in .*tokenizer\.model"
    with pytest.raises(ConfigError, match=message):
        train(tiny, tmp_path / "run", "steps=1", f"model.{name}=9")
    with pytest.raises(ConfigError, match=message):
        export_run(load_config(tiny, [f"run_dir={run.run_dir}", f"model.{name}=9"]), tmp_path / "x")


def test_shards_with_other_ids_than_the_model(tiny: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(load_config(tiny).data.shards, tmp_path / "shards")
    edit(Path(shards) / "manifest.json", eos_id=5)
    with pytest.raises(ConfigError, match=r"model\.eos_token_id = 1 should be 5, as in the man"):
        train(tiny, tmp_path / "run", "steps=1", f"data.shards={shards}")
