"""Built-in checkers, the user's, and what becomes of those that fail."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.config.post import SandboxConfig
from trainer.post.checkers import CheckerPool, Response, Sandbox, Score
from trainer.post.checkers.builtin import built_in, same
from trainer.process.errors import PostTrainingError

CHECKERS = built_in(Sandbox(SandboxConfig()))


def reward(
    checker: str, answer: str = "", fields: dict[str, Any] | None = None, **more: Any
) -> float:
    return CHECKERS[checker](Response(answer=answer, fields=fields or {}, **more))


@pytest.mark.parametrize(
    "answer, expected, right",
    [
        ("The sum is\n 1,234 ", 1234, True),
        ("1234.0", "1234", True),
        ("so \\boxed{12} and \\boxed{ 13 }.", 13, True),
        ("so \\boxed{13} and \\boxed{12}", 13, False),
        ("13 or 14", 13, False),
        ("New   York", "New York", True),
        ("yes", ["no", "yes"], True),
        ("", "yes", False),
        ("nan", "nan", True),
        ("Infinity", 3, False),
    ],
)
def test_exact_answer(answer: str, expected: Any, right: bool) -> None:
    assert reward("exact_answer", answer, {"expected": expected}) == right
    assert reward("exact_answer", answer, {"expected": expected}, problem="it has no end") == 0


ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
CASES = [
    {"call": "add", "arguments": [1, 2], "result": 3},
    {"call": "add", "arguments": [[1], [2]], "result": [1, 2]},
    {"call": "add", "arguments": [1, "a"], "result": 0},
]


@pytest.mark.parametrize(
    "answer, fields, expected",
    [
        (ADD, {"cases": CASES[:2]}, 1.0),
        (ADD, {"cases": CASES}, 0.0),
        (ADD, {"cases": CASES, "partial": True}, 2 / 3),
        (ADD, {"tests": "assert add(2, 2) == 4"}, 1.0),
        (ADD, {"tests": "assert add(2, 2) == 5", "cases": CASES[:2]}, 0.0),
        ("def add(a, b): return a + b", {"cases": CASES[:1]}, 1.0),
        ("```py\ndef add(a, b): return 0\n```\n" + ADD, {"cases": CASES[:1]}, 1.0),
        ("```python\nraise SystemExit(0)\n```", {"tests": "assert False"}, 0.0),
        ("```python\nimport os; os._exit(0)\n```", {"tests": "assert False"}, 0.0),
        ("no code at all", {"cases": CASES[:1]}, 0.0),
    ],
)
def test_unit_tests(answer: str, fields: dict[str, Any], expected: float) -> None:
    assert reward("unit_tests", answer, fields) == pytest.approx(expected)


def test_same() -> None:
    assert same({"a": [1, 2.0]}, {"a": [1, 2]}) and same(0.1 + 0.2, 0.3)
    assert not same(True, 1) and not same([1], [1, 2]) and not same("1", 1)
    assert not same(None, 0) and not same(float("nan"), float("nan"))


def test_tool_calls() -> None:
    call = {"name": "weather", "arguments": {"city": "Ulm", "days": 2}}
    other = {"name": "weather", "arguments": {"city": "Ulm", "days": 3}}
    assert reward("tool_calls", calls=[call], fields={"calls": [call]}) == 1
    for calls in ([other], [], [call, call]):
        assert reward("tool_calls", calls=calls, fields={"calls": [call]}) == 0
    assert reward("tool_calls", calls=[call], fields={"calls": [call]}, problem="x") == 0


def test_released_form_and_length() -> None:
    assert reward("released_form", effort="high", reasoning="so") == 1
    assert reward("released_form", effort="high", reasoning=" ") == 0
    assert reward("released_form", effort="none") == 1
    assert reward("released_form", effort="none", problem="it has no end") == 0
    fields = {"max_tokens": 5, "min_tokens": 2}
    rewards = [reward("length", tokens=n, fields=fields) for n in (1, 2, 5, 6)]
    assert rewards == [0, 1, 1, 0]


USER = """
import os, sys, time

def even(response):
    return response.tokens % 2 == 0

def fails(response):
    return {
        "raised": lambda: 1 / 0,
        "hung": lambda: time.sleep(1e6),
        "died": lambda: os._exit(0),
        "value": lambda: 1.5,
        "reads": lambda: len(sys.stdin.read() + open(0).read()),
        "prints": lambda: [print("x" * (1 << 20)) for _ in range(1 << 10)] and 1.0,
    }[response.answer]()

number = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(USER)
    return str(path)


def test_a_checker_that_fails_costs_its_answer_alone(user_file: str) -> None:
    fails, even = f"{user_file}:fails", f"{user_file}:even"
    kinds = ["raised", "hung", "died", "value", "prints", "reads", "raised"]
    answers = [(fails, Response(answer=kind)) for kind in kinds]
    answers += [(even, Response(answer="", tokens=n)) for n in range(10)]
    start = time.monotonic()
    with CheckerPool([fails, even], SandboxConfig(), workers=2, seconds=4.0) as pool:
        first, second = pool.score(answers), pool.score(answers[7:])
        failures = dict(pool.failures)
        workers = [worker._process for worker in pool._workers if worker._process]
    assert time.monotonic() - start < 60
    assert (
        first[0].reward == 0 and first[0].failure == "it raised ZeroDivisionError: division by zero"
    )
    assert first[1] == Score(0.0, "it took more than 4 s", "hung")
    assert first[2] == Score(0.0, "it ended its process", "died")
    assert first[3] == Score(0.0, "it returned 1.5, which is no number from 0 to 1", "value")
    assert first[4:6] == [Score(1.0), Score(0.0)]
    assert [score.reward for score in first[7:]] == [1, 0] * 5 == [s.reward for s in second]
    assert failures == {
        (fails, "raised"): 2,
        (fails, "hung"): 1,
        (fails, "died"): 1,
        (fails, "value"): 1,
    }
    assert workers and not any(psutil.pid_exists(worker.pid) for worker in workers)


def test_checkers_that_cannot_be_loaded(user_file: str) -> None:
    for name, message in {
        "exact": "neither built in .exact_answer, length, released_form, tool_calls, unit_tests.",
        "no.such.module:f": "cannot be loaded: ModuleNotFoundError",
        f"{user_file}:missing": "cannot be loaded: AttributeError",
        f"{user_file}:number": "is no function, but int",
        "/no/such/file.py:f": "cannot be loaded: FileNotFoundError",
    }.items():
        with pytest.raises(PostTrainingError, match=message):
            CheckerPool([name], SandboxConfig(), workers=1)


def test_built_in_checkers_in_the_pool() -> None:
    answers = [
        ("unit_tests", Response(answer=ADD, fields={"cases": CASES[:2]})),
        ("unit_tests", Response(answer="```python\nwhile True: pass\n```", fields={"tests": "1"})),
        ("exact_answer", Response(answer="3", fields={"expected": 3})),
        ("exact_answer", Response(answer="3")),
    ]
    sandbox = SandboxConfig(wall_seconds=2.0)
    with CheckerPool({name for name, _ in answers}, sandbox, workers=2) as pool:
        scores = pool.score(answers)
    assert [score.reward for score in scores] == [1, 0, 1, 0]
    assert scores[3].failure == "it raised KeyError: 'expected'"
    assert pool.failures == {("exact_answer", "raised"): 1}


def test_workers_import_no_torch() -> None:
    with CheckerPool(["length"], SandboxConfig(), workers=1) as pool:
        process = pool._workers[0]._process
        assert process is not None
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in maps
