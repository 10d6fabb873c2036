"""DSML: every record comes back, as segments and through the tokenizer's ids."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.text.conversation import Conversation, read_messages
from data.text.dsml import decode, encode, parse, render
from data.text.messages import EFFORTS, END_OF_NAME
from data.text.prompts import Prompts
from data.text.segments import Special
from data.text.special_tokens import NAMED
from data.text.tokenizer import Tokenizer

NASTY = [
    *NAMED,
    *('"', "\\", "\n", "\n\n<", "</", "<｜DSML｜invoke name=", "</｜DSML｜parameter>"),
    *('" string="true">', "tool_calls>\n", "invoke>", "{}", "null", "1e5", "true", "<a><b>"),
    *("▁", "<0x41>", "\x00", "\n\n", "## Tools\n\n", "### Available Tool Schemas\n\n"),
]
# Marks that are plain text in the released form.
PLAIN_MARKS = ["<tool_result>", "</tool_result>", "\n\n## Response Format:\n\n", '\n{"a": 1}']
characters = st.text(st.characters(exclude_categories=["Cs"]))


def joined(fragments: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.sampled_from(fragments), characters)).map("".join)


numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def records(draw: st.DrawFn, fragments: list[str] = NASTY) -> tuple[list[dict[str, Any]], str]:
    """The messages of a conversation as people write them, and its effort."""
    texts = joined(fragments)
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, texts),
        lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(texts, x, max_size=3)),
        max_leaves=6,
    )
    names = texts.filter(lambda name: not END_OF_NAME.search(name))
    functions = st.fixed_dictionaries({"name": texts, "parameters": values})
    instructions = {
        "content": texts,
        "tools": st.lists(functions, max_size=2),
        "response_format": st.none() | st.dictionaries(texts, values, max_size=2),
    }
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system"} | draw(st.fixed_dictionaries(instructions)))
    ids: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        is_open = bool(messages) and messages[-1]["role"] in ("user", "developer", "tool")
        if not is_open and draw(st.booleans()):
            messages.append({"role": "latest_reminder", "content": draw(texts)})
        for name in draw(st.permutations(ids)) if ids else []:
            messages.append({"role": "tool", "tool_call_id": name, "content": draw(texts)})
        task = draw(st.sampled_from((None, None, "query", "read_url", "action", "domain")))
        if not ids or draw(st.booleans()):
            kind = draw(st.sampled_from(("user", "user", "developer")))
            question: dict[str, Any] = {"role": kind, "content": draw(texts), "task": task}
            if kind == "developer":
                question |= draw(st.fixed_dictionaries(instructions))
                question["task"] = None if task == "read_url" else task
            elif task == "read_url":
                question["url"] = draw(texts)
            messages.append(question)
        if draw(st.booleans()) and not messages[-1].get("task"):
            continue
        ids = draw(st.lists(names, max_size=3, unique=True))
        answer = {
            "role": "assistant",
            "content": draw(texts),
            "reasoning_content": draw(st.none() | texts),
        }
        if messages[-1].get("task"):
            ids = []
        else:
            answer["task"] = draw(st.sampled_from((None, None, "title")))
            answer["tool_calls"] = [
                {
                    "id": name,
                    "name": draw(texts),
                    "arguments": draw(st.dictionaries(names, values, max_size=3)),
                }
                for name in ids
            ]
        messages.append(answer)
        if answer.get("task"):
            messages.append({"role": "assistant", "content": draw(texts)})
            ids = []
    if messages and messages[-1]["role"] == "latest_reminder":
        messages.pop()
    return messages, draw(st.sampled_from((*EFFORTS, None)))


def same(a: Conversation, b: Conversation) -> bool:
    """Equal with the types and the order of keys."""
    return a.model_dump_json() == b.model_dump_json() and repr(a) == repr(b)


slow = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@given(records())
@slow
def test_segments_give_the_record_back(record: tuple[list[dict[str, Any]], str]) -> None:
    conversation = read_messages(*record)
    segments = render(conversation)
    assert same(parse(segments), conversation)
    assert all(segments)
    assert read_messages(json.dumps(record[0]), record[1]) == conversation


@given(records([*NASTY, *PLAIN_MARKS]))
@slow
def test_marks_in_plain_text_come_back_as_what_they_spell(
    record: tuple[list[dict[str, Any]], str],
) -> None:
    segments = render(read_messages(*record))
    assert render(parse(segments)) == segments


@given(record=records())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_give_the_record_back(
    tokenizer: Tokenizer, record: tuple[list[dict[str, Any]], str]
) -> None:
    prompts = Prompts(tools="｜DSML｜{tool_schemas}<think>", max_effort="<｜user｜>")
    conversation = read_messages(*record)
    ids = encode(conversation, tokenizer, prompts)
    assert same(decode(ids, tokenizer, prompts), conversation)


@pytest.mark.parametrize(
    "segments",
    [
        [Special("<｜Assistant｜>"), "x"],
        [Special("<｜User｜>"), Special("<think>"), "x"],
        [Special("<｜User｜>"), "x", Special("<｜Assistant｜>"), "x"],
        [
            *(Special("<｜User｜>"), Special("<｜Assistant｜>"), Special("</think>")),
            *("x", Special("｜DSML｜"), "tool_calls>\n"),
        ],
        [Special("<｜begin▁sys｜>"), Special("<｜tool▁sep｜>"), "{", Special("<｜end▁sys｜>")],
        [*render(read_messages([{"role": "system", "tools": [{"name": "f"}]}]))[:-1], "{"],
    ],
)
def test_other_segments_are_one_sentence(segments: list[str]) -> None:
    with pytest.raises(DataError, match=r"segment .* of a conversation is .*; expected") as caught:
        parse(segments)
    assert "\n" not in str(caught.value)


def test_values_beyond_python_s_nesting_are_no_json() -> None:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]},
    ]
    deep = "[" * 100_000
    segments = [
        part.replace("[1]", deep) if "[1]" in part else part
        for part in render(read_messages(messages))
    ]
    assert deep in "".join(map(str, segments))
    with pytest.raises(DataError, match=r"expected a JSON value"):
        parse(segments)
    with pytest.raises(DataError, match=r"not JSON \(it is nested too deeply\)"):
        read_messages(deep)
    call = {"function": {"name": "f", "arguments": deep}}
    with pytest.raises(DataError, match="it is nested too deeply"):
        read_messages([messages[0], {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    calls = [{"name": "f", "arguments": {"x": value}}]
    messages = [{"role": "user"}, {"role": "assistant", "tool_calls": calls}]
    with pytest.raises(DataError, match=r"is not a conversation: messages\.1"):
        read_messages(messages)
