"""Answers as token ids, in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data import Tokenizer
from data.text import encode, read_messages
from data.text.messages import Effort
from trainer.config import load_config
from trainer.post.checkers import Response, read_response

TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"city": "Ulm", "days": 2}}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(load_config(tiny).data.tokenizer.path)


def parts_of(
    tokenizer: Tokenizer, answer: dict[str, Any], effort: Effort, cut: int | None = None
) -> Response:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "", "tools": [TOOL]},
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", **answer},
    ]
    question = encode(read_messages(messages[:2], effort), tokenizer)
    whole = encode(read_messages(messages, effort), tokenizer)
    assert whole[: len(question)] == question
    ids = whole[len(question) :][:cut]
    return read_response(question, ids, tokenizer, effort, {"expected": 1})


def test_thinking_text_and_calls(tokenizer: Tokenizer) -> None:
    answer = {"reasoning_content": "look", "content": "I ask.", "tool_calls": [CALL]}
    response = parts_of(tokenizer, answer, "high")
    assert (response.answer, response.reasoning, response.problem) == ("I ask.", "look", "")
    assert [(call.name, call.arguments) for call in response.calls] == [tuple(CALL.values())]
    assert (response.effort, response.fields) == ("high", {"expected": 1})
    plain = parts_of(tokenizer, {"content": "No."}, "none")
    assert (plain.answer, plain.reasoning, plain.problem) == ("No.", None, "")
    assert plain.tokens > 2


def test_answers_that_leave_the_form(tokenizer: Tokenizer) -> None:
    answer = {"reasoning_content": "look", "content": "I ask.", "tool_calls": [CALL]}
    thinking = parts_of(tokenizer, answer, "high", cut=2)
    assert (thinking.answer, thinking.problem) == ("", "its reasoning has no end")
    cut = parts_of(tokenizer, answer, "high", cut=-1)
    assert cut.problem == "it has no end" and cut.calls == [] and cut.reasoning == "look"
    question = encode(read_messages([{"role": "user", "content": "a"}]), tokenizer)
    odd = [tokenizer.special["｜DSML｜"], tokenizer.eos_id]
    broken = read_response(question, odd, tokenizer, "none", {})
    assert broken.problem.startswith("it leaves the released form: segment")
    empty = read_response(question, [], tokenizer, "none", {})
    assert (empty.answer, empty.problem) == ("", "it has no end")


def test_plain_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" 12")
    whole = read_response([], [*ids, tokenizer.eos_id], tokenizer, None, {})
    assert (whole.answer, whole.problem, whole.reasoning) == (" 12", "", None)
    assert read_response([], ids, tokenizer, None, {}).problem == "it has no end"
