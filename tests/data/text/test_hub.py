"""Released tokenizers: fetched once from a server that stands in for the hub; special tokens."""

import json
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.prepare.run import prepare
from data.prepare.tokenizer_training import train_tokenizer
from data.text import Tokenizer
from data.text.special_tokens import special_ids
from tests.hub_server import start_hub

PLACE = "hf://datasets/me/data"


@pytest.fixture
def released(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, bytes]:
    """The files of a released tokenizer."""
    tokenizer.export_hf(tmp_path / "released", max_length=4096)
    names = ("tokenizer.json", "tokenizer_config.json")
    return {name: (tmp_path / "released" / name).read_bytes() for name in names}


def test_it_is_fetched_once_and_stays(
    released: dict[str, bytes],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = released | {"other/tokenizer.json": released["tokenizer.json"], "no/README.md": b"x"}
    with start_hub(files) as endpoint:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        first = Tokenizer(PLACE)
        assert f"{PLACE}@abc names the same one" in capsys.readouterr().err
        assert Tokenizer(f"{PLACE}/other/tokenizer.json").special == first.special
        for path in (f"{PLACE}/no", f"{PLACE}/absent"):
            with pytest.raises(DataError, match=rf"no tokenizer at {path}: expected tok"):
                Tokenizer(path)
        with pytest.raises(DataError, match=r"cannot fetch the tokenizer hf://datasets/me/none: "):
            Tokenizer("hf://datasets/me/none")
    assert first.encode("def f():\n") == tokenizer.encode("def f():\n")
    folder = tmp_path / "cache/v4-pretrain/tokenizers/datasets%2Fme%2Fdata"
    assert (folder / "commit").read_text() == "abc\n"
    assert (folder / "tokenizer_config.json").read_bytes() == released["tokenizer_config.json"]
    capsys.readouterr()
    again = Tokenizer(PLACE)  # the server is gone
    assert again.hash == first.hash and not capsys.readouterr().err
    again.copy_to(tmp_path / "run")
    assert Tokenizer(tmp_path / "run").hash == first.hash


def test_it_is_not_trained_and_is_one_for_all_hosts(config: DataConfig) -> None:
    fields = config.model_dump() | {"tokenizer": {"path": PLACE}}
    with pytest.raises(DataError, match="is a released tokenizer, which is used as it is; to"):
        train_tokenizer(DataConfig.model_validate(fields))
    with pytest.raises(ValidationError, match=r"should name a commit, as hf://.*@COMMIT"):
        DataConfig.model_validate(fields | {"engine": "ray"})
    pinned = {"tokenizer": {"path": f"{PLACE}@abc"}, "engine": "ray"}
    DataConfig.model_validate(fields | pinned)


def test_missing_special_tokens_are_named_together(
    config: DataConfig, released: dict[str, bytes], tmp_path: Path
) -> None:
    spec = json.loads(released["tokenizer.json"])
    gone = ("<｜User｜>", "<think>")
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in gone]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    source = {"name": "s", "paths": [str(tmp_path)], "content": "conversation"}
    fields = {"tokenizer": {"path": str(tmp_path)}, "sources": [source]}
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(
        DataError, match=r"no special token <｜User｜>, <think>; conversations need"
    ):
        prepare(DataConfig.model_validate(config.model_dump() | fields), progress=False)


def test_other_ids_than_those_of_v4_are_reported(
    released: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = json.loads(released["tokenizer.json"])
    spec["model"]["vocab"] |= {f"<pad {i}>": i for i in range(1024, 129280)}
    for token in spec["added_tokens"]:
        number = special_ids(129280)[token["content"]]
        spec["model"]["vocab"].pop(f"<pad {number}>", None)
        token["id"] = spec["model"]["vocab"][token["content"]] = number
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec))
    Tokenizer(file).check_special_tokens((), "")
    assert not capsys.readouterr().err
    think = next(t for t in spec["added_tokens"] if t["content"] == "<think>")
    think["id"] = spec["model"]["vocab"]["<think>"] = 128798
    spec["model"]["vocab"].pop("<pad 128798>")
    file.write_text(json.dumps(spec))
    Tokenizer(file).check_special_tokens((), "")
    assert "has <think> at 128798, and DeepSeek-V4 at 128821" in capsys.readouterr().err
