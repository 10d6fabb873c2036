"""The run folder that is named is the one that every command works in, whatever its config has."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data.files import sha256_of
from tests.trainer.tiny import make_tiny, steps_in_file, train
from trainer.__main__ import main as train_command
from trainer.commands import main as command
from trainer.config import ConfigError, load_config, load_run


@pytest.fixture(scope="module")
def original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that keeps one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "original"
    train(tiny, folder, "steps=2", "checkpoint.keep=1")
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def test_a_copy_is_trained_evaluated_exported_and_drawn(
    original: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(original)
    assert train_command([str(copy), "steps=3"]) == 0
    assert steps_in_file(copy) == [1, 2, 3]
    assert load_config(copy / "config.yaml").run_dir == copy
    capsys.readouterr()
    assert command(["eval", str(copy)]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert command(["export", str(copy), str(tmp_path / "hf")]) == 0
    assert f"step 3 of {copy}" in capsys.readouterr().out
    assert command(["report", str(copy)]) == 0
    assert (copy / "report.html").is_file()
    assert command(["plan", str(copy)]) == 0
    assert str(copy) in capsys.readouterr().out
    assert digests(original) == before


def test_the_shards_of_a_copy_are_reported_with_its_own_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    train(make_tiny(tmp_path), run, "steps=1")
    shutil.copytree(run, copy)
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "tokenizer")
    before = digests(copy)
    assert command(["data-report", str(copy)]) == 0
    assert f"wrote {tmp_path / 'shards/report.html'}" in capsys.readouterr().out
    assert digests(copy) == before and not run.exists()


def test_an_import_goes_into_the_folder_that_is_named(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["export", str(original), str(tmp_path / "hf")]) == 0
    folder = tmp_path / "new"
    folder.mkdir()
    shutil.copy(original / "config.yaml", folder)
    before = digests(original)
    assert command(["import", str(folder), str(tmp_path / "hf")]) == 0
    assert (folder / "checkpoints/step-00000000").is_dir() and digests(original) == before


def test_a_renamed_and_a_linked_run(original: Path, copy: Path, tmp_path: Path) -> None:
    renamed = copy.rename(tmp_path / "renamed")
    (tmp_path / "latest").symlink_to(renamed)
    assert load_run(renamed).run_dir == renamed
    assert load_run(tmp_path / "latest").run_dir == tmp_path / "latest"
    assert load_run(renamed, [f"run_dir={tmp_path / 'latest'}"]).run_dir == renamed


def test_another_working_directory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths are those of the first start; a resume elsewhere finds run and data."""
    monkeypatch.chdir(tiny.parent)
    relative = ["data.shards=shards", "data.tokenizer.path=tokenizer"]
    relative.append("data.sources.0.paths=[words.jsonl]")
    run = os.path.relpath(tmp_path / "run")
    assert train_command([tiny.name, f"run_dir={run}", "steps=1", *relative]) == 0
    data = load_config(tmp_path / "run/config.yaml").data
    assert data.shards == str(tiny.parent / "shards")
    assert data.sources[0].paths == (str(tiny.parent / "words.jsonl"),)
    monkeypatch.chdir(tmp_path)
    assert train_command(["run", "steps=2"]) == 0
    assert steps_in_file(tmp_path / "run") == [1, 2]
    capsys.readouterr()
    assert command(["eval", "run"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_two_folders_on_one_command_line(
    original: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(copy)
    with pytest.raises(ConfigError, match=r"run_dir = .*original is not the run folder .*copy"):
        load_run(copy, [f"run_dir={original}"])
    for main, words in ((train_command, []), (command, ["report"])):
        assert main([*words, str(copy), f"run_dir={original}"]) == 2
    assert digests(copy) == before


def test_the_config_file_of_a_copy(original: Path, copy: Path) -> None:
    """A file has no folder of its own to prefer; that of another run's folder is ambiguous."""
    with pytest.raises(ConfigError, match=r"copy, and has run_dir = .*original; name the folder"):
        load_run(copy / "config.yaml")
    assert load_run(original / "config.yaml").run_dir == original
    assert load_run(copy / "config.yaml", [f"run_dir={copy}"]).run_dir == copy


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x: &a [*a]", "Circular reference"),
        ("data: &a {sources: *a}", "Circular reference"),
        (f"a: {'[' * 3000}", "is nested too deeply"),
        (f"a: {'[' * 3000}{']' * 3000}", "is nested too deeply"),
    ],
)
def test_a_file_without_an_end(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        load_run(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_a_name_with_a_nul(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command([str(original), "data.shards=a\0b"]) == 2
    assert "has a NUL, which no path can have" in capsys.readouterr().err


def test_a_name_that_is_not_utf8(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither config.yaml nor the headers of checkpoints can have it."""
    copy = Path(shutil.copytree(original, tmp_path / os.fsdecode(b"caf\xe9")))
    before = digests(copy)
    for name in ("eval", "report", "plan"):
        assert command([name, str(copy)]) == 2
    assert command(["export", str(original), str(copy / "hf")]) == 2
    assert train_command([str(copy), "steps=3"]) == 2
    assert train_command([str(original), f"data.shards={copy}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("is not UTF-8; rename") == 6
    assert digests(copy) == before


def test_a_handwritten_config_in_the_run_folder_is_kept(tiny: Path, tmp_path: Path) -> None:
    written, kept = tmp_path / "config.yaml", tmp_path / "config.input.yaml"
    text = f"# why this rate\nbase: {tiny}\nsteps: 1\nrun_dir: {tmp_path}\n"
    written.write_text(text)
    assert train_command([str(tmp_path)]) == 0
    assert kept.read_text() == text
    resolved = load_run(tmp_path).to_yaml()
    assert written.read_text() == resolved and "# why" not in resolved

    assert train_command([str(tmp_path), "steps=2"]) == 0
    written.write_text("# longer\n" + written.read_text())
    assert train_command([str(tmp_path), "steps=3"]) == 0
    assert [path.name for path in sorted(tmp_path.glob("config*"))] == [
        *("config.input-2.yaml", "config.input.yaml", "config.yaml")
    ]
    assert (tmp_path / "config.input-2.yaml").read_text().startswith("# longer\n")
    assert kept.read_text() == text and load_run(tmp_path).steps == 3


def test_a_tilde_is_the_home_in_every_path(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is called `~` would be written, and one day removed by `rm -r ~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(tiny.read_text())
    (tmp_path / "config.yaml").write_text("base: ~/base.yaml\nrun_dir: ~/run\n")
    chat = (
        "{name: chat, paths: [~/chat, ~/more], content: conversation, prompts_file: ~/encoder.py}"
    )
    overrides = ["data.shards=~/shards", "data.tokenizer.path=~/tokenizer"]
    config = load_config(tmp_path / "config.yaml", [*overrides, f"data.sources=[{chat}]"])
    (source,) = config.data.sources
    assert source.paths == (str(tmp_path / "chat"), str(tmp_path / "more"))
    assert source.prompts_file == str(tmp_path / "encoder.py")
    assert config.run_dir == tmp_path / "run" and config.data.shards == str(tmp_path / "shards")
    assert config.data.tokenizer.path == str(tmp_path / "tokenizer")
    assert "~" not in config.to_yaml()
