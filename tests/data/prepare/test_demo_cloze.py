"""The demo's cloze: questions of validation text alone, the same for the same text."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.prepare.demo_cloze import CHOICES, MAX_QUESTIONS, write_demo_cloze
from data.prepare.splits import is_validation
from launch.demo import CHANCE, CONFIG
from trainer.config import load_config
from trainer.evaluation.task_files import read_task_file

LETTERS = "abcdefghijklmnop"


def words(seed: int, count: int) -> str:
    """Different words of letters alone."""
    numbers = (seed * 1000 + i for i in range(count))
    return " ".join("".join(LETTERS[n >> 4 * k & 15] for k in range(5)) for n in numbers)


def config_of(folder: Path, texts: list[str], fraction: float = 0.3) -> DataConfig:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("code.jsonl", "prose.jsonl"):
        (folder / name).write_text(lines if name == "prose.jsonl" else '{"text": "x = 1"}\n')
    sources = (f"data.sources.{i}.paths=[{folder / name}]" for i, name in enumerate(FILES))
    return load_config(CONFIG, [*sources, f"data.validation_fraction={fraction}"]).data


FILES = ("code.jsonl", "prose.jsonl")


def questions_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cloze.jsonl").read_text("utf-8").splitlines()]


def test_questions_are_of_validation_text_alone(tmp_path: Path) -> None:
    texts = [words(seed, 200) for seed in range(60)]
    config = config_of(tmp_path, texts)
    validation = [t for t in texts if is_validation(config.sources[1], t, 0.3)]
    copied = " ".join(validation[0].split()[:30])  # stands in the training text, too
    texts += [f"{copied} {words(seed, 50)}" for seed in range(70, 80)]
    config = config_of(tmp_path, texts)

    assert write_demo_cloze(config, tmp_path / "one") == MAX_QUESTIONS
    write_demo_cloze(config, tmp_path / "two")
    for name in ("cloze.jsonl", "cloze.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    questions = questions_of(tmp_path / "one")
    for question in questions:
        passage = f"{question['context']} {question['choices'][question['answer']]}"
        assert any(passage in text for text in validation)
        assert passage not in copied
        assert len(set(question["choices"])) == CHOICES == 1 / CHANCE
        for choice in question["choices"]:
            assert choice in " ".join(validation)
    places = [question["answer"] for question in questions]
    assert {places.count(place) for place in range(CHOICES)} == {MAX_QUESTIONS // CHOICES}
    read_task_file(tmp_path / "one" / "cloze.yaml")  # a task file that runs no code


def test_too_little_validation_text_is_one_sentence(tmp_path: Path) -> None:
    config = config_of(tmp_path, [words(1, 200)], fraction=0.0)
    with pytest.raises(DataError, match=r"has 0 passages .* raise data.validation_fraction = 0"):
        write_demo_cloze(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
