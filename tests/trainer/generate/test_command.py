"""`v4 generate` on a run and on its export: the same text, and one sentence about wrong input."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer.generate.generate
from data import Tokenizer
from data.storage import StoragePath
from model.cache import CachedModel
from tests.trainer.tiny import train
from trainer.checkpoint import CheckpointReader
from trainer.commands import main
from trainer.config import ConfigError, load_config, load_run
from trainer.export import export_run
from trainer.generate.command import INCOMPLETE, Decoder, _prompts
from trainer.generate.generate import prompt_ids


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps, and its export."""
    folder = tmp_path_factory.mktemp("generate")
    config = train(tiny, folder / "run", "steps=2")
    export_run(config, folder / "export")
    return {"run": config.run_dir, "export": folder / "export"}


def generate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Returns what the command prints on stdout and stderr."""
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["generate", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("v4: error: ")
    return line


def test_run_and_export_continue_alike(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt=the cat", "--prompt=a", "--max-new-tokens=9", "--temperature=0", "--json"]
    texts = [generate(capsys, folder, *options)[0] for folder in folders.values()]
    export_run(load_run(folders["run"]), StoragePath("memory://generate/hf"))
    texts.append(generate(capsys, "memory://generate/hf", *options)[0])
    assert texts[0] == texts[1] == texts[2]
    first, second = map(json.loads, texts[0].splitlines())
    assert (first["prompt"], second["prompt"]) == ("the cat", "a")
    assert first["tokens"] == 9 and first["finish"] == "length" and first["text"]


def test_a_streamed_text_is_that_of_json(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max-new-tokens=30", "--seed=3"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the\ncat"))
    streamed, report = generate(capsys, folders["run"], *options)
    result = json.loads(
        generate(capsys, folders["run"], *options, "--prompt=the\ncat", "--json")[0]
    )
    assert streamed == f"the\ncat{result['text']}\n"
    assert "30 tokens, " in report and "MTP drafts accepted" in report


def test_no_part_of_a_character_is_printed(tiny: Path) -> None:
    """Characters of several tokens each, then one that is cut off."""
    tokenizer = Tokenizer(load_config(tiny).data.tokenizer.path)
    text = "naïve 漢字 😀 end"
    decoder = Decoder(tokenizer)
    parts = [decoder.add(token) for token in tokenizer.encode(text)]
    assert "".join(parts) == text and "" in parts
    ids = tokenizer.encode("x😀")
    assert [decoder.add(token) for token in ids[:-1]][1:] == [""] * (len(ids) - 2)
    assert decoder.end() == INCOMPLETE * (len(ids) - 2)


def test_prompts_of_a_file(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the\ncat\n")
    text, _ = generate(capsys, folders["run"], f"--file={file}", "--max-new-tokens=1")
    assert text.startswith("--- 1 of 2\nthe") and "--- 2 of 2\ncat" in text


def test_a_prompt_that_is_too_long(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiny's max_position_embeddings is 4,096."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a b " * 4096))
    for folder in folders.values():
        message = error_of(capsys, folder, f"--prompt={'a b ' * 4096}", "--max-new-tokens=1")
        assert "prompt 1 has " in message and "exceeds model.max_position_embeddings" in message
    assert "max_position_embeddings = 4,096" in error_of(capsys, folders["run"])


def test_an_empty_standard_input(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "prompt 1 of 1 is empty" in error_of(capsys, folders["run"])


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_folders_that_are_no_model(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for folder, sentence in (
        (tmp_path, "is neither a run folder"),
        (tmp_path / "file", "is neither a run folder"),
        (tmp_path / "none", "is neither a run folder"),
        (broken, "config.json: is not valid JSON"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert main([verb, str(folder)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("v4: error: ") and sentence in line


def test_a_quantised_folder_without_a_scale(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["model.hidden_size=32", "model.moe_intermediate_size=64"]
    config = train(tiny, tmp_path / "run", "steps=1", *sizes)
    export_run(config, tmp_path / "out", weights="mxfp4_experts")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    del tensors["layers.0.ffn.experts.2.w3.scale"]
    save_file(tensors, path)
    message = error_of(capsys, tmp_path / "out", "--prompt=a")
    assert "w3.weight is quantised, but layers.0.ffn.experts.2.w3.scale is missing" in message


def test_lines_end_with_a_line_feed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with nothing else that Python splits at; the one that ends stdin is no part of it."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\x0cb\r\nc\u2028d\x85\n".encode())
    options = argparse.Namespace(prompt=["e"], file=str(file))
    assert _prompts(options) == ["e", "a\x0cb", "c\u2028d\x85"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert _prompts(argparse.Namespace(prompt=[], file=None)) == ["one\ntwo"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ConfigError, match="prompt 1 of 1 is empty"):
        _prompts(argparse.Namespace(prompt=[], file=None))


def test_a_prompt_gets_one_bos(tiny: Path) -> None:
    tokenizer = Tokenizer(load_config(tiny).data.tokenizer.path)
    spelled = tokenizer.decode([tokenizer.bos_id])
    ids = prompt_ids(tokenizer, "the")
    assert ids[0] == tokenizer.bos_id and prompt_ids(tokenizer, spelled + "the") == ids


def test_complete_texts_are_printed_at_once(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second prompt is continued does not take the first one's text."""
    made: list[CachedModel] = []

    def interrupted(*arguments: Any) -> CachedModel:
        if made:
            raise KeyboardInterrupt
        made.append(CachedModel(*arguments))
        return made[0]

    monkeypatch.setattr(trainer.generate.generate, "MAX_SEQUENCES", 1)
    monkeypatch.setattr(trainer.generate.generate, "CachedModel", interrupted)
    options = ["--prompt=the", "--prompt=a", "--json", "--max-new-tokens=2"]
    assert main(["generate", str(folders["run"]), *options]) == 130
    assert json.loads(capsys.readouterr().out)["prompt"] == "the"


def test_weights_that_are_not_finite(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_nan(self: CheckpointReader, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
        tensors = read(self, dtypes)
        tensors["norm.weight"][0] = torch.nan
        return tensors

    read = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", with_nan)
    error = error_of(capsys, folders["run"], "--prompt=a")
    assert "norm.weight has values that are NaN or infinite" in error


def test_wrong_input(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = folders["run"]
    assert "prompt 2 of 2 is empty" in error_of(capsys, run, "--prompt=a", "--prompt=")
    assert "is neither a run folder" in error_of(capsys, tmp_path, "--prompt=a")
    long = error_of(capsys, run, "--prompt=a", "--max-new-tokens=100000")
    assert "exceeds model.max_position_embeddings" in long
    assert "should be one token" in error_of(capsys, run, "--prompt=a", "--stop=two words")
    assert "was not" in error_of(capsys, run, "--prompt=a", "--packed")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "has no line" in error_of(capsys, run, f"--file={empty}")
    empty.write_bytes(b"caf\xe9\n")
    assert "prompt 1 of 1 is not UTF-8: its byte 0xe9" in error_of(capsys, run, f"--file={empty}")
    assert "is not UTF-8" in error_of(capsys, run, "--prompt=caf\udce9")
    assert "temperature is nan" in error_of(capsys, run, "--prompt=a", "--temperature=nan")
    assert "memory://none/x: is neither" in error_of(capsys, "memory://none/x", "--prompt=a")
    assert "should name a bucket" in error_of(capsys, "s3://", "--prompt=a")
    assert "No such file" in error_of(capsys, run, f"--file={tmp_path / 'none'}")
