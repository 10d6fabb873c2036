"""The chat template writes what `data.text.dsml` does, through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.text.chat_template import CHAT_TEMPLATE_FILE, chat_template, export_chat_template
from data.text.conversation import read_messages
from data.text.dsml import encode, render
from data.text.prompts import OWN_PROMPTS, Prompts
from data.text.special_tokens import BOS, NAMED
from data.text.tokenizer import Tokenizer
from tests.data.text.test_dsml import PLAIN_MARKS, records

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"days": 2}}}
# Spellings of special tokens, which a template cannot write as text, are not among them.
FRAGMENTS = [
    *('"', "\\", "\n", "\n\n<", "</", "'", "{{", "{%", "#}", "&<>", "\r\n", "😀", "é", "\x00"),
    *('" string="true">', "tool_calls>\n", "invoke>", "{}", "null", "1e5", "true", "<a><b>"),
    *("\n\n", "## Tools\n\n", "### Available Tool Schemas\n\n", *PLAIN_MARKS),
]
PROMPTS = Prompts(
    tools='Call "<{dsml_token}tool_calls>"\\n\n{tool_schemas}\n😀é {{x}} {thinking_end_token}\n',
    response_format="As in\n'{schema}'\x01",
    max_effort="Think.\r\n\n",
)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat template")
    tokenizer.export_hf(folder, 4096)
    export_chat_template(tokenizer, folder, OWN_PROMPTS)
    return folder


@pytest.fixture(scope="module")
def hf(exported: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(exported)


def written(
    hf: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    effort: str | None = None,
    prompts: Prompts = OWN_PROMPTS,
    **options: Any,
) -> str:
    if effort is not None:
        options["reasoning_effort"] = effort
    if prompts is not OWN_PROMPTS:
        options["chat_template"] = chat_template(prompts)
    options = {"add_generation_prompt": True, **options}
    return str(hf.apply_chat_template(messages, tokenize=False, **options))


def expected(
    messages: list[dict[str, Any]], effort: str | None = None, prompts: Prompts = OWN_PROMPTS
) -> str:
    return BOS + "".join(render(read_messages(messages, effort), prompts))


@given(record=records(FRAGMENTS))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("prompts", [OWN_PROMPTS, PROMPTS], ids=["own", "others"])
def test_it_writes_what_the_encoder_writes(
    hf: PreTrainedTokenizerBase, prompts: Prompts, record: tuple[list[dict[str, Any]], str]
) -> None:
    messages, effort = record
    if messages:  # transformers takes no empty list
        assert written(hf, messages, effort, prompts) == expected(messages, effort, prompts)


def test_the_folder_s_template_is_the_one_of_these_prompts(
    tokenizer: Tokenizer, exported: Path, tmp_path: Path
) -> None:
    """Also in the ids, since no text here spells a special token."""
    assert (exported / CHAT_TEMPLATE_FILE).read_text() == chat_template()
    tokenizer.export_hf(tmp_path, 4096)
    export_chat_template(tokenizer, tmp_path, PROMPTS)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "S", "tools": [TOOL]}, {"role": "user"}]
    ids = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [tokenizer.bos_id, *encode(read_messages(messages), tokenizer, PROMPTS)]


def test_tools_beside_the_messages(hf: PreTrainedTokenizerBase) -> None:
    """As OpenAI's API has them, with a system message and without one."""
    system, question = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    for first in ([], [system]):
        inside = [{"role": "system", **(first[0] if first else {}), "tools": [TOOL]}, question]
        assert written(hf, [*first, question], "high", tools=[TOOL]) == expected(inside, "high")
    with pytest.raises(TemplateError, match=r"^messages\.0: tools are given twice"):
        written(hf, inside, tools=[TOOL])


def test_effort_by_the_names_of_other_models(hf: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "U"}]
    for name in ("thinking", "enable_thinking"):
        assert written(hf, messages, **{name: True}) == expected(messages, "high")
        assert written(hf, messages, "max", **{name: True}) == expected(messages, "max")
        assert written(hf, messages, "max", **{name: False}) == expected(messages, "none")
    with pytest.raises(TemplateError, match=r"^reasoning_effort is low; it is one of none"):
        written(hf, messages, "low")


def test_without_a_request_for_an_answer(hf: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "U"}]
    assert written(hf, messages, add_generation_prompt=False) == f"{BOS}<｜User｜>U"
    messages.append({"role": "assistant", "content": "A"})
    assert written(hf, messages, add_generation_prompt=False) == expected(messages)


def test_texts_in_parts(hf: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    results = [
        {"type": "tool_result", "content": "two", "tool_use_id": "c2"},
        *parts,
        {"type": "tool_result", "content": parts, "tool_use_id": "c1"},
    ]
    calls = [{**CALL, "id": name} for name in ("c1", "c2")]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    messages = [{"role": "user", "content": parts}, answer, {"role": "user", "content": results}]
    assert written(hf, messages) == expected(messages)


def refusals() -> dict[str, list[dict[str, Any]]]:
    user, answer = {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}
    called = {"role": "assistant", "tool_calls": [CALL]}
    as_text = {"name": "f", "arguments": "{}"}
    unwritable = {"name": "f", "arguments": {'a" string="true">': 1}}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    return {
        r"messages\.1: a system message may only be the first": [user, {"role": "system"}],
        r"messages\.0: an assistant message answers": [answer],
        r"messages\.2: an assistant message answers": [user, answer, answer],
        r"messages\.1: a tool message follows the assis": [user, {"role": "tool"}],
        r"messages\.2: no call before it has the id 'x'; the calls are c1": [
            *(user, called),
            {"role": "tool", "tool_call_id": "x"},
        ],
        r"messages\.1: only an assistant message may": [{**user, "task": "query"}, user],
        r"messages\.0: `url` and `task` = read_url need": [{**user, "task": "read_url"}],
        r"messages\.0: the role user has no task title": [{**user, "task": "title"}],
        r"messages\.2: the answer to a task is text": [
            *(user, {**answer, "task": "title"}),
            {**answer, "task": "title"},
        ],
        r"messages\.1: a latest_reminder goes before": [user, {"role": "latest_reminder"}],
        r"messages\.0: tool 0 is no object of a function": [{"role": "system", "tools": [{}]}],
        r"messages\.1: the arguments of f should be an object": [
            user,
            {"role": "assistant", "tool_calls": [as_text]},
        ],
        r"messages\.1: the parameter's name": [
            user,
            {"role": "assistant", "tool_calls": [unwritable]},
        ],
        r"messages\.0: the role critic has no written form": [{"role": "critic"}],
        r"messages\.0: .* part of the type image_url": [image],
        r"messages\.0: its content should be text": [{"role": "system", "content": 1}],
    }


@pytest.mark.parametrize(("problem", "messages"), refusals().items())
def test_what_has_no_written_form_is_refused(
    hf: PreTrainedTokenizerBase, problem: str, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(TemplateError, match=f"^{problem}"):
        written(hf, messages)


def test_an_imported_tokenizer_keeps_its_template(
    tokenizer: Tokenizer, exported: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("source", "copy", "inside", "copy of inside", "bare")]
    source, copy, inside, second, bare = folders
    for folder in folders:
        tokenizer.export_hf(folder, 4096)
        (folder / "tokenizer.model").unlink()
    (source / CHAT_TEMPLATE_FILE).write_text("own")
    export_chat_template(Tokenizer(source), copy, OWN_PROMPTS)
    assert (copy / CHAT_TEMPLATE_FILE).read_text() == "own"

    settings_file = second / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"chat_template": "own"}))
    export_chat_template(Tokenizer(inside), second, OWN_PROMPTS)
    spec = json.loads((bare / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in NAMED]
    (bare / "tokenizer.json").write_text(json.dumps(spec))
    export_chat_template(Tokenizer(bare), bare, OWN_PROMPTS)
    assert not [folder for folder in (second, bare) if (folder / CHAT_TEMPLATE_FILE).exists()]
