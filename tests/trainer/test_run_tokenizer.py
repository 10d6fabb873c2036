"""A run keeps its tokenizer, whatever happens to the one that its config names."""

import json
import shutil
from pathlib import Path

import pytest

from data import Tokenizer
from tests.trainer.tiny import column, make_tiny, train
from trainer.checkpoint import RunCheckpoint
from trainer.commands import main
from trainer.config import ConfigError, load_config, load_run
from trainer.parallel.grid import Grid
from trainer.process.errors import CheckpointError
from trainer.run_tokenizer import keep_tokenizer, run_data
from trainer.trainer import Trainer


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config, tokenizer and shards of its own, which the test may spoil."""
    return make_tiny(tmp_path)


def test_a_finished_run_outlives_its_tokenizer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny, run, "steps=3")
    tokenizer = tmp_path / "tokenizer/tokenizer.model"
    content = tokenizer.read_bytes()
    assert (run / "tokenizer/tokenizer.model").read_bytes() == content
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    before = json.loads(capsys.readouterr().out)

    other = [str(tiny), "data.tokenizer.vocab_size=390"]
    assert main(["tokenizer-train", *other]) == 2
    assert "tokenizer.model is there already" in capsys.readouterr().err
    assert tokenizer.read_bytes() == content
    assert main(["tokenizer-train", *other, "--overwrite"]) == 0
    assert tokenizer.read_bytes() != content
    assert main(["prepare", *other]) == 2
    assert "another data.shards, or replace them with --overwrite" in capsys.readouterr().err

    assert main(["eval", str(run)]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == before
    assert output.err.startswith("v4: warning: ") and output.err.count("\n") == 1
    assert f"{tokenizer} is not the tokenizer" in output.err
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == content
    assert main(["data-report", str(run)]) == 0
    config = load_run(run, ["steps=5"])
    Trainer(config, Grid.single()).run()
    assert len(column(run, "loss")) == 5
    shutil.rmtree(tokenizer.parent)
    assert main(["eval", str(run)]) == 0
    assert (run / "tokenizer/tokenizer.model").read_bytes() == content


def test_another_tokenizer_in_the_run_folder_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    """As where a project's tokenizer is in the folder that is named as run_dir."""
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    other = run / "tokenizer/tokenizer.model"
    other.write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"run/tokenizer/tokenizer.model is another tokenizer"):
        train(tiny, run, "steps=1")
    assert other.read_bytes() == b"another" and not (run / "config.yaml").exists()
    (run / "tokenizer").rename(run / "old")
    config = train(tiny, run, "steps=1")
    assert Tokenizer(run_data(config).tokenizer.path).hash == Tokenizer(tmp_path / "tokenizer").hash


def test_an_imported_tokenizer_is_copied_with_its_config(tiny: Path, tmp_path: Path) -> None:
    Tokenizer(tmp_path / "tokenizer").export_hf(tmp_path / "hf", 4096)
    (tmp_path / "hf/tokenizer.model").unlink()
    config = load_config(tiny, [f"data.tokenizer.path={tmp_path / 'hf'}"])
    keep_tokenizer(config, Tokenizer(tmp_path / "hf"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (config.run_dir / "tokenizer" / name).read_bytes() == (
            tmp_path / "hf" / name
        ).read_bytes()


def test_a_run_without_a_copy_names_both_tokenizers(tiny: Path, tmp_path: Path) -> None:
    """As runs of earlier versions are."""
    run = tmp_path / "run"
    config = train(tiny, run, "steps=1")
    shutil.rmtree(run / "tokenizer")
    assert run_data(config) == config.data
    local = Trainer(config, Grid.single())
    checkpoint = RunCheckpoint(config, Grid.single(), local.model, local.optimizer, "f" * 64)
    with pytest.raises(CheckpointError, match=r"another tokenizer than the one in .*/tokenizer \("):
        checkpoint.load(local.state)
    local.run()
    assert (run / "tokenizer/tokenizer.model").is_file()


def test_the_tokenizer_of_a_run_is_not_trained_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where data.tokenizer.path is RUN/tokenizer, which is the run's own copy at once."""
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "tokenizer", run / "tokenizer")
    named = f"data.tokenizer.path={run / 'tokenizer'}"
    train(tiny, run, "steps=1", named)
    content = (run / "tokenizer/tokenizer.model").read_bytes()
    assert main(["tokenizer-train", str(tiny), named, "--overwrite"]) == 2
    assert "tokenizer is the tokenizer of the run in" in capsys.readouterr().err
    assert (run / "tokenizer/tokenizer.model").read_bytes() == content
