"""Made-up tasks: their right answers are right, and files are a function of the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import Tokenizer
from data.text import encode, read_messages
from data.text.messages import EFFORTS
from trainer.config import load_config
from trainer.config.post import SandboxConfig
from trainer.post.checkers import CheckerPool, Response, read_response
from trainer.post.tasks import DOMAINS, write_tasks
from trainer.post.tasks.files import draw_tasks
from trainer.process.errors import PostTrainingError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_right_answers_are_right_in_every_mode_and_longer_with_effort(tiny: Path) -> None:
    """As a model would give them: through the released form and the domain's checker."""
    tokenizer = Tokenizer(load_config(tiny).data.tokenizer.path)
    answers: list[tuple[str, Response]] = []
    for name, domain in DOMAINS.items():
        for task in draw_tasks(name, 0, 8):
            fields = {"messages": task.messages, **task.fields}
            lengths = []
            for effort in EFFORTS:
                question = encode(read_messages(task.messages, effort), tokenizer)
                whole = encode(read_messages(task.answered(effort)["messages"], effort), tokenizer)
                ids = whole[len(question) :]
                response = read_response(question, ids, tokenizer, effort, fields)
                assert (response.problem, bool(response.reasoning)) == ("", effort != "none")
                answers.append((domain.checker, response))
                lengths.append(len(ids))
            assert lengths == sorted(lengths) and len(set(lengths)) == 3
    others = [fields.fields for _, fields in answers]
    wrong = [
        (checker, response.model_copy(update={"fields": other}))
        for (checker, response), other in zip(answers, others[3:] + others[:3], strict=True)
    ]
    with CheckerPool({c.checker for c in DOMAINS.values()}, SandboxConfig(), workers=2) as pool:
        assert [score.reward for score in pool.score(answers)] == [1.0] * len(answers)
        assert sum(score.reward for score in pool.score(wrong[::3])) == 0


def test_files_depend_on_the_seed_alone_and_have_no_question_twice(tmp_path: Path) -> None:
    for folder, seed in (("one", 5), ("two", 5), ("three", 6)):
        write_tasks(tmp_path / folder, seed, test=20, train=30, answered=10)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(f"{d}.{p}.jsonl" for d in DOMAINS for p in ("answered", "test", "train"))
    for name in names:
        one, two, three = ((tmp_path / f / name).read_bytes() for f in ("one", "two", "three"))
        assert one == two != three
    for domain in DOMAINS:
        parts = {p: lines(tmp_path / f"one/{domain}.{p}.jsonl") for p in ("test", "train")}
        answered = lines(tmp_path / f"one/{domain}.answered.jsonl")
        assert [len(part) for part in (*parts.values(), answered)] == [20, 30, 30]
        questions = [json.dumps(r["messages"]) for part in parts.values() for r in part]
        questions += {json.dumps(record["messages"][:-1]) for record in answered}
        assert len(set(questions)) == len(questions) == 60
        for record in answered:
            assert read_messages(record["messages"], record["reasoning_effort"]).is_answered


def test_sums_carry() -> None:
    for task in draw_tasks("arithmetic", 1, 50):
        first, second = (int(n) for n in task.messages[0]["content"].split(" = ")[0].split(" + "))
        digits = zip(str(first)[::-1], str(second)[::-1], strict=False)
        assert any(int(a) + int(b) >= 10 for a, b in digits)


def test_more_tasks_than_there_are() -> None:
    with pytest.raises(PostTrainingError, match=r"tools has hardly more than \d,\d+ tasks"):
        draw_tasks("tools", 0, 20000)
