"""Answers of a scripted model: how they are shown, kept, and given back in the next turn."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trainer.generate.chat
from data import Tokenizer
from data.text import encode, read_messages
from tests.model.tiny import random_model, tiny_config
from trainer.commands import main
from trainer.config import load_config
from trainer.generate import OpenedModel, Request, Sampling, Statistics
from trainer.generate.chat import Chat

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "weather", "arguments": {"city": "Ulm", "days": 2}}


@pytest.fixture(scope="module")
def opened(tiny: Path) -> OpenedModel:
    tokenizer = Tokenizer(load_config(tiny).data.tokenizer.path)
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size))
    return OpenedModel(model, tokenizer, None, "none")


def script(monkeypatch: pytest.MonkeyPatch, answers: list[list[int]]) -> list[list[int]]:
    """Lets answers of these tokens follow one another; returns the prompts, once they are made."""
    asked: list[list[int]] = []
    rest = iter(answers)

    class Scripted:
        def __init__(self, model: Any, request: Request, ranks: Any, attention: str) -> None:
            asked.append(list(request.prompts[0]))
            self.request, self.statistics = request, Statistics()

        def __iter__(self) -> Iterator[tuple[int, int]]:
            return iter([(0, token) for token in next(rest)])

    monkeypatch.setattr(trainer.generate.chat, "Generation", Scripted)
    return asked


def answer_of(tokenizer: Tokenizer, messages: list[dict[str, Any]], effort: str) -> list[int]:
    """The tokens of the last message, as the encoder writes it after the others."""
    whole = encode(read_messages(messages, effort), tokenizer)
    before = encode(read_messages(messages[:-1], effort), tokenizer)
    assert whole[: len(before)] == before
    return whole[len(before) :]


def test_reasoning_calls_and_results(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = opened.tokenizer
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Short answers.", "tools": [TOOL]},
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "reasoning_content": "look", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "reasoning_content": "dry", "content": "No rain."},
    ]
    answers = [answer_of(tokenizer, messages[:end], "high") for end in (3, 5)]
    asked = script(monkeypatch, answers)
    chat = Chat(opened, "high", Sampling(), 50, system="Short answers.", tools=[TOOL])
    first = list(chat.send("rain?"))
    assert "".join(text for text, reasons in first if reasons) == "look"
    assert "".join(text for text, reasons in first if not reasons) == ""
    assert [(call.name, call.arguments) for call in chat.calls] == [
        ("weather", {"city": "Ulm", "days": 2})
    ]
    second = list(chat.give_results(["no"]))
    assert "".join(text for text, reasons in second if not reasons) == "No rain."
    assert chat.calls == []
    expected = encode(read_messages(messages[:4], "high"), tokenizer)
    assert asked[1] == [tokenizer.bos_id, *expected]


def test_an_answer_that_does_not_follow_the_form_is_kept_as_text(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tool call without an end, and an argument that no JSON parser can nest."""
    tokenizer = opened.tokenizer
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 7}}]},
    ]
    whole = answer_of(tokenizer, messages, "none")
    at = next(n for n, token in enumerate(whole) if tokenizer.decode([token]).strip(">") == "7")
    nested = [*whole[:at], *tokenizer.encode(">" + "[" * 2000), *whole[at + 1 :]]
    call = [tokenizer.special["｜DSML｜"], *tokenizer.encode("tool_calls>"), tokenizer.eos_id]
    script(monkeypatch, [nested, call])
    for _ in range(2):
        chat = Chat(opened, "none", Sampling(), 50)
        list(chat.send("hello"))
        assert chat.messages[-1]["role"] == "assistant" and chat.calls == []
        assert "the answer is kept as text" in capsys.readouterr().err
    assert chat.messages[-1]["content"] == "tool_calls>"


def test_reasoning_that_is_cut_off_is_no_answer(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = opened.tokenizer
    asked = script(monkeypatch, [tokenizer.encode("never ends"), [tokenizer.eos_id]])
    chat = Chat(opened, "high", Sampling(), 50)
    assert all(reasons for text, reasons in chat.send("hello") if text)
    assert chat.messages[-1]["reasoning_content"] == "never ends"
    report = capsys.readouterr().err
    assert "ended at its limit of" in report and "its reasoning has no end" in report
    list(chat.send("again"))
    assert "never ends" not in tokenizer.decode(asked[1])


def test_conversations_differ_in_their_seed(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds: list[int] = []

    class Seeded:
        def __init__(self, model: Any, request: Request, ranks: Any, attention: str) -> None:
            seeds.append(request.seed)
            self.request, self.statistics = request, Statistics()

        def __iter__(self) -> Iterator[tuple[int, int]]:
            return iter([(0, opened.tokenizer.eos_id)])

    monkeypatch.setattr(trainer.generate.chat, "Generation", Seeded)
    monkeypatch.setattr(trainer.generate.chat, "open_shared", lambda folder: nullcontext(opened))
    for options in ([], [], ["--seed=5"], ["--seed=5"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("x\ny\n"))
        assert main(["chat", str(tmp_path), *options]) == 0
    assert seeds[0] != seeds[2] and seeds[4:6] == seeds[6:8] and seeds[4] != seeds[5]


def test_the_command_reads_turns(
    opened: OpenedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    tokenizer = opened.tokenizer
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "", "tools": [TOOL]},
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    final = [*tokenizer.encode("none"), tokenizer.eos_id]
    asked = script(monkeypatch, [answer_of(tokenizer, messages, "none"), final])
    monkeypatch.setattr(trainer.generate.chat, "open_shared", lambda folder: nullcontext(opened))
    monkeypatch.setattr("sys.stdin", io.StringIO("rain?\n\n\nnot read\n"))
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    assert main(["chat", str(tmp_path), f"--tools={tools}"]) == 0
    out = capsys.readouterr().out
    assert 'calls weather({"city": "Ulm", "days": 2})' in out and out.endswith("none\n")
    assert "<tool_result></tool_result>" in tokenizer.decode(asked[1])  # an empty line is one
    tools.write_text("{}")
    assert main(["chat", str(tmp_path), f"--tools={tools}"]) == 2
    assert "should hold a list of tools, not a dict" in capsys.readouterr().err


def test_a_conversation_that_is_too_long(opened: OpenedModel) -> None:
    model = SimpleNamespace(config=tiny_config(max_position_embeddings=8))
    chat = Chat(OpenedModel(model, opened.tokenizer, None, "none"), "none", Sampling(), 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_position_embeddings is 8"):
        list(chat.send("a conversation of many tokens"))
