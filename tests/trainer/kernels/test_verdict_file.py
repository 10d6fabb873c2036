"""Verdicts on disk: of this key and no other, whole or made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.kernels.fake_check import GPU
from trainer.kernels import verdict_file
from trainer.kernels.verdict import Problem, Verdict
from trainer.kernels.verdict_file import Key, cache_folder, path_of, read_verdicts, write_verdicts

PROBLEM = Problem({"hidden_size": 64}, "bfloat16", 4096, ("attention", "norms"), ((8, 16),))
KEY = Key(GPU, PROBLEM, "0" * 64)
VERDICTS = (
    Verdict("attention", False, "needs too much shared memory", "eager"),
    Verdict(
        *("norms", True, "1.8 times as fast as eager", "triton", {"rows": 4}),
        {"eager": (1e-3, 2e-3), "triton": (1e-3, float("nan"))},
        {"eager": 0.2, "triton": 0.11},
    ),
)


def test_verdicts_come_back_as_they_were(tmp_path: Path) -> None:
    write_verdicts(tmp_path, KEY, VERDICTS)
    verdicts = read_verdicts(tmp_path, KEY)
    assert verdicts is not None and repr(tuple(verdicts.values())) == repr(VERDICTS)  # NaN


OTHERS = {
    "GPU": replace(KEY, platform=replace(GPU, name="NVIDIA H200")),
    "capability": replace(KEY, platform=replace(GPU, capability="9.1")),
    "processors": replace(KEY, platform=replace(GPU, processors=114)),
    "driver": replace(KEY, platform=replace(GPU, driver="580.82")),
    "torch": replace(KEY, platform=replace(GPU, torch_version="2.14.0")),
    "CUDA": replace(KEY, platform=replace(GPU, cuda="13.1")),
    "triton": replace(KEY, platform=replace(GPU, triton="3.8.0")),
    "libraries": replace(KEY, platform=replace(GPU, libraries="quack 0.6.4")),
    "sources": replace(KEY, sources="1" * 64),
    "sizes": replace(KEY, problem=replace(PROBLEM, model={"hidden_size": 128})),
    "tokens": replace(KEY, problem=replace(PROBLEM, micro_tokens=8192)),
    "dtype": replace(KEY, problem=replace(PROBLEM, dtype="float16")),
    "matrices": replace(KEY, problem=replace(PROBLEM, matrices=((8, 8),))),
    "deterministic": replace(KEY, problem=replace(PROBLEM, deterministic=True)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_verdict_of_another_key_is_not_used(tmp_path: Path, what: str) -> None:
    other = OTHERS[what]
    write_verdicts(tmp_path, KEY, VERDICTS)
    assert read_verdicts(tmp_path, other) is None
    path_of(tmp_path, KEY).rename(path_of(tmp_path, other))  # or copied from another machine
    lines: list[str] = []
    assert read_verdicts(tmp_path, other, lines.append) is None
    assert lines == [
        f"{path_of(tmp_path, other)} is about another GPU, software or model; the kernels are "
        "checked again"
    ]


def test_a_change_of_a_kernels_source_is_another_key(tmp_path: Path) -> None:
    root = tmp_path / "model" / "kernels" / "norm"
    root.mkdir(parents=True)
    (root / "norm_triton.py").write_text("BLOCK = 1\n")
    before = verdict_file.source_digest(tmp_path)
    (root / "norm_triton.py").write_text("BLOCK = 2\n")
    assert verdict_file.source_digest(tmp_path) != before


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "other JSON": lambda text: '{"key": {}, "verdicts": 3}',
    "no such implementation": lambda text: text.replace('"choice": "triton"', '"choice": "os"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_none_and_has_a_line(tmp_path: Path, damage: str) -> None:
    write_verdicts(tmp_path, KEY, VERDICTS)
    path = path_of(tmp_path, KEY)
    path.write_text(DAMAGES[damage](path.read_text()))
    lines: list[str] = []
    assert read_verdicts(tmp_path, KEY, lines.append) is None
    assert lines == [f"{path} is damaged; the kernels are checked again"]


def test_the_cache_is_the_users_or_the_runs_where_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(tmp_path / "run") == tmp_path / "v4-pretrain" / "kernels"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(tmp_path / "run") == tmp_path / "run"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(tmp_path / "run") == tmp_path / ".cache" / "v4-pretrain" / "kernels"
