"""The released form of conversations, as strings written by hand."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.text.conversation import read_messages
from data.text.dsml import encode, parse, render
from data.text.prompts import OWN_PROMPTS, Prompts, read_prompts
from data.text.tokenizer import Tokenizer

EOS = "<｜end▁of▁sentence｜>"
ENCODER = '''
"""Not run: this would raise."""
raise SystemExit("run")
TOOLS_TEMPLATE = """## Tools

Write <{dsml_token}tool_calls> after {thinking_start_token}..{thinking_end_token}, {{never}} else.

### Available Tool Schemas

{tool_schemas}

That is all.
"""
response_format_template: str = (
    "## Response Format:\\n\\n"
    "As in\\n{schema}"
)
REASONING_EFFORT_MAX = (
    "Effort: all of it.\\n\\n"
)
'''
SEARCH = {"name": "search", "parameters": {"q": {"type": "string"}}}
OPEN = {"name": "öffnen"}


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    (tmp_path / "encoding.py").write_text(ENCODER)
    return read_prompts(tmp_path / "encoding.py")


def written(
    messages: list[dict[str, Any]], effort: str | None = None, prompts: Prompts = OWN_PROMPTS
) -> str:
    record = read_messages(messages, effort)
    segments = render(record, prompts)
    assert parse(segments, prompts) == record
    return "".join(segments)


def system(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "system", "content": content} | fields


def user(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | fields


def answer(content: str, reasoning: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning} | fields


def call(name: str, arguments: str, key: str) -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content: Any, key: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": key, "content": content}


CHAT = [system("S"), user("U1"), answer("A1", "R1"), user("U2"), answer("A2", "R2")]


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        (
            "none",
            f"S<｜User｜>U1<｜Assistant｜></think>A1{EOS}<｜User｜>U2<｜Assistant｜></think>A2{EOS}",
        ),
        (
            "high",
            f"S<｜User｜>U1<｜Assistant｜></think>A1{EOS}"
            f"<｜User｜>U2<｜Assistant｜><think>R2</think>A2{EOS}",
        ),
        (
            "max",
            f"Effort: all of it.\n\nS<｜User｜>U1<｜Assistant｜></think>A1{EOS}"
            f"<｜User｜>U2<｜Assistant｜><think>R2</think>A2{EOS}",
        ),
    ],
)
def test_efforts_and_earlier_reasoning(prompts: Prompts, effort: str, expected: str) -> None:
    assert written(CHAT, effort, prompts) == expected


def test_effort_by_default() -> None:
    """High where reasoning is there, none otherwise."""
    assert written(CHAT) == written(CHAT, "high")
    bare = [user("U"), answer("A")]
    assert written(bare) == written(bare, "none") != written(bare, "high")
    assert written(bare, "high") == f"<｜User｜>U<｜Assistant｜><think></think>A{EOS}"


def test_prompts_to_continue() -> None:
    """Without an answer, the form ends with what asks for it."""
    assert written([user("U")], "none") == "<｜User｜>U<｜Assistant｜></think>"
    assert written([user("U")], "high") == "<｜User｜>U<｜Assistant｜><think>"


def test_tools_and_their_results(prompts: Prompts) -> None:
    """Names are raw, results come in the order of the calls, and all reasoning stays."""
    tools = [{"type": "function", "function": SEARCH}, OPEN]
    calls = [
        call('se"arch', '{"q": "x", "n": [1, null, "é"], "a\\"b": ""}', "c1"),
        call("öffnen", "{}", "c2"),
    ]
    messages = [
        system("S", tools=tools),
        {"role": "latest_reminder", "content": "Monday"},
        user("U1"),
        answer("", "R1", tool_calls=calls),
        tool([{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}], "c2"),
        tool("one", "c1"),
        user("and?"),
        answer("A", "R2"),
        user("U2"),
        answer("B", "R3"),
    ]
    section = (
        "## Tools\n\nWrite <｜DSML｜tool_calls> after <think>..</think>, {never} else.\n\n"
        "### Available Tool Schemas\n\n"
        '{"name": "search", "parameters": {"q": {"type": "string"}}}\n{"name": "öffnen"}\n\n'
        "That is all.\n"
    )
    expected = (
        f"S\n\n{section}<｜latest_reminder｜>Monday<｜User｜>U1<｜Assistant｜><think>R1</think>\n\n"
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="se"arch">\n'
        '<｜DSML｜parameter name="q" string="true">x</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">[1, null, "é"]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="a"b" string="true"></｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="öffnen">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}<｜User｜><tool_result>one</tool_result>\n\n"
        "<tool_result>two\n\nparts</tool_result>\n\nand?<｜Assistant｜><think>R2</think>"
        f"A{EOS}<｜User｜>U2<｜Assistant｜><think>R3</think>B{EOS}"
    )
    assert written(messages, "high", prompts) == expected
    assert written(messages, "max", prompts) == "Effort: all of it.\n\n" + expected


def test_response_format_and_developer(prompts: Prompts) -> None:
    schema = {"type": "object"}
    response = '## Response Format:\n\nAs in\n{"type": "object"}'
    messages = [system("S", response_format=schema), user("U")]
    assert written(messages, "none", prompts).startswith(f"S\n\n{response}<｜User｜>U")
    section = (
        "## Tools\n\nWrite <｜DSML｜tool_calls> after <think>..</think>, {never} else.\n\n"
        '### Available Tool Schemas\n\n{"name": "öffnen"}\n\nThat is all.\n'
    )
    developer = {"role": "developer", "content": "D", "tools": [OPEN], "response_format": schema}
    assert written([system("S"), developer, answer("A", "R")], "high", prompts) == (
        f"S<｜User｜>D\n\n{section}\n\n{response}<｜Assistant｜><think>R</think>A{EOS}"
    )


@pytest.mark.parametrize("task", ["query", "authority", "domain"])
def test_tasks(task: str) -> None:
    messages = [user("U", task=task), answer("X")]
    assert written(messages, "high") == f"<｜User｜>U<｜{task}｜>X{EOS}"
    assert written(messages[:1], "high") == f"<｜User｜>U<｜{task}｜>"


def test_tasks_with_a_form_of_their_own() -> None:
    url = [user("U", task="read_url", url="http://x"), answer("yes")]
    expected = f"<｜User｜>U<｜extracted_url｜>http://x<｜read_url｜>yes{EOS}"
    assert written(url) == expected
    action = [user("U", task="action"), answer("Search")]
    assert written(action) == f"<｜User｜>U<｜Assistant｜></think><｜action｜>Search{EOS}"
    assert written(action, "high") == f"<｜User｜>U<｜Assistant｜><think><｜action｜>Search{EOS}"
    title = [user("U"), answer("A", "R", task="title"), answer("T")]
    expected = f"<｜User｜>U<｜Assistant｜><think>R</think>A{EOS}<｜title｜>T{EOS}"
    assert written(title) == expected
    expected = f"<｜User｜>U<｜Assistant｜></think>A{EOS}<｜title｜>T{EOS}"
    assert written([*title, user("V")], "none") == expected + "<｜User｜>V<｜Assistant｜></think>"


def test_spelled_special_tokens_stay_text(tokenizer: Tokenizer) -> None:
    spelled = "<think></think><｜User｜><｜Assistant｜>｜DSML｜<｜query｜>" + EOS
    arguments = {"a": spelled}
    messages = [
        system(spelled, tools=[{"name": spelled}]),
        user(spelled),
        answer(spelled, spelled, tool_calls=[{"name": spelled, "arguments": arguments}]),
        {"role": "tool", "content": spelled},
        answer(spelled, spelled),
    ]
    written(messages)
    ids = encode(read_messages(messages), tokenizer)
    counts = {name: ids.count(tokenizer.special[name]) for name in ("<think>", EOS, "<｜query｜>")}
    assert counts == {"<think>": 3, EOS: 2, "<｜query｜>": 0}  # one <think> in the tools section


WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([user("U"), system("S")], r"messages\.1: a system message may only be the first"),
    ([answer("A")], r"messages\.0: an assistant message answers"),
    ([user("U"), answer("A"), answer("B")], r"messages\.2: an assistant message answers"),
    ([user("U"), tool("R", "c")], r"messages\.1: a tool message follows the assistant"),
    (
        [user("U"), answer("", tool_calls=[call("f", "{}", "c1")]), tool("R", "zz")],
        r"messages\.2: no call before it has the id 'zz'; the calls are c1",
    ),
    ([user("U", task="query"), user("V")], r"messages\.1: only an assistant message may follow"),
    ([user("U", task="read_url")], r"messages\.0\.user: `url` and `task` = read_url need each"),
    ([user("U", task="title")], r"messages\.0\.user\.task: Input should be 'query'"),
    (
        [user("U"), {"role": "latest_reminder", "content": "L"}, answer("A")],
        r"messages\.1: a latest_reminder goes before the user message",
    ),
    ([system("S", tools=[{"x": 1}])], r"messages\.0\.system\.tools: tool 0 is no object of a"),
    ([user("U", thinking="x")], r"messages\.0\.user\.thinking is no field of it; those are"),
    (
        [user("U"), answer("", tool_calls=[call("f", "[", "c")])],
        r"messages\.1\.assistant\.tool_calls\.0\.arguments: .*Expecting value",
    ),
    (
        [user("U"), answer("", tool_calls=[{"name": "f", "arguments": {'a" string="true">': 1}}])],
        "the parameter's name .* cannot be written",
    ),
    ([user("U\ud800")], r"messages\.0 has the lone surrogate U\+D800"),
]


@pytest.mark.parametrize(("messages", "reason"), WRONG)
def test_wrong_messages_are_one_sentence(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(DataError, match=f"^is not a conversation: .*{reason}") as caught:
        read_messages(messages)
    assert "\n" not in str(caught.value)


def test_wrong_effort() -> None:
    with pytest.raises(DataError, match=r"effort is 'low'; it is one of none, high, max"):
        read_messages([user("U")], "low")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("TOOLS_TEMPLATE = ", "is not Python"),
        ("\0", "is not Python"),
        ("x = 1", "no string constant TOOLS_TEMPLATE or response_format_template or REASONING"),
        (ENCODER.replace("{tool_schemas}", "{tools}"), r"unknown placeholder \{tools\}; known are"),
        (ENCODER.replace("{tool_schemas}", ""), "0 placeholders {tool_schemas}; it needs exactly"),
        (ENCODER.replace("Effort: all of it.\\n\\n", ""), "text of the maximum effort is empty"),
        (ENCODER.replace("<{dsml", "<{{dsml"), "Single '}' encountered"),
        (ENCODER.replace("<{dsml_token}", ""), r"no {dsml_token} before {tool_schemas}"),
        (ENCODER.replace('"## Res', 'f"## Res'), "no string constant response_format_template"),
    ],
)
def test_wrong_prompts_files(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "encoding.py"
    file.write_text(content)
    with pytest.raises(DataError, match=rf"the prompts file .*encoding\.py.*{reason}") as caught:
        read_prompts(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cannot read the prompts file .*: Is a directory"):
        read_prompts(tmp_path)
