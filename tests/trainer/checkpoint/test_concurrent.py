"""`v4 eval` and `v4 export` beside a training that removes the checkpoint they read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.tiny import train
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.reader import CheckpointReader
from trainer.commands import main


def disturb(
    monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], change: Callable[[], None]
) -> None:
    """Calls `change` when a method is called for the first time."""
    plain, calls = getattr(*place), []

    def method(*arguments: Any) -> Any:
        if not calls:
            change()
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(*place, method)


PLACES = {
    "verifying": (CheckpointFolder, "_problem"),
    "reading": (CheckpointReader, "__init__"),
    "loading": (CheckpointFolder, "load"),
    "copying": (CheckpointReader, "read"),
}


@pytest.mark.parametrize(
    ("verb", "place"),
    [("eval", "verifying"), ("eval", "loading"), ("export", "reading"), ("export", "copying")],
)
@pytest.mark.parametrize("newer", [True, False])
def test_a_checkpoint_that_is_removed_while_it_is_read(
    tiny: Path,
    tmp_path: Path,
    verb: str,
    place: str,
    newer: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = tmp_path / "run", tmp_path / "hf"
    train(tiny, run, "steps=2", "checkpoint={every: 1, keep: 0}")
    old, new = (run / f"checkpoints/step-0000000{step}" for step in (1, 2))
    new.rename(tmp_path / "aside")

    def save_and_prune() -> None:
        if newer:
            (tmp_path / "aside").rename(new)
        shutil.rmtree(old)

    disturb(monkeypatch, PLACES[place], save_and_prune)
    if PLACES[place][1] == "_problem":
        monkeypatch.setattr(CheckpointFolder, "_problem", staticmethod(CheckpointFolder._problem))
    capsys.readouterr()
    code = main([verb, str(run), *[str(out)] * (verb == "export")])
    output = capsys.readouterr()
    if not newer:
        sentence = f"{old}: was removed while it was read, and there is no other checkpoint"
        assert (code, output.err) == (2, f"v4: error: {sentence}\n")
        assert not out.exists() and not list(tmp_path.glob(".*"))
        return
    assert (code, output.err) == (0, f"v4: {old} was removed while it was read; reading {new}\n")
    if verb == "eval":
        assert json.loads(output.out.splitlines()[-1])["step"] == 2
    else:
        assert output.out.startswith("wrote step 2 of ") and (out / "config.json").is_file()


def test_another_failure_is_not_repeated(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path, "steps=1")
    calls: list[Path] = []

    def load(self: CheckpointFolder, path: Path, tensors: object) -> None:
        calls.append(path)
        raise RuntimeError("ours")

    monkeypatch.setattr(CheckpointFolder, "load", load)
    with pytest.raises(RuntimeError, match="ours"):
        main(["eval", str(tmp_path)])
    assert len(calls) == 1
