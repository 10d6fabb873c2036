"""Conversations from files to shards and back, and records that are none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.indexed import open_shard
from data.prepare.corpus import Corpus
from data.prepare.run import prepare
from data.prepare.tokenizer_training import train_tokenizer
from data.text.conversation import read_messages
from data.text.dsml import decode
from data.text.tokenizer import Tokenizer

TOOLS = [{"name": "search", "parameters": {"query": {"type": "string"}}}]
CALLS = [
    {"name": "search", "arguments": {"query": '"x" <｜DSML｜parameter>', "n": 3}},
    {"name": "other", "arguments": {"deep": {"list": [1, None, "s"]}, "on": True}},
]
RECORDS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "Be brief.", "tools": TOOLS},
        {"role": "user", "content": "Find <｜DSML｜ and\u2028</think>"},
        {"role": "assistant", "reasoning_content": "a search", "tool_calls": CALLS},
        {"role": "tool", "content": "found"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "There it is."},
    ],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello.", "task": "title"},
        {"role": "assistant", "content": "Greeting"},
    ],
    [{"role": "user", "content": "hm", "task": "query"}, {"role": "assistant", "content": "why"}],
]


def as_json_lines(folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in RECORDS]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return {"paths": [str(folder / "a.jsonl.gz")]}


def as_parquet(folder: Path) -> dict[str, Any]:
    table = pyarrow.table({"chat": [json.dumps(messages) for messages in RECORDS]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    path = str(folder / "a.parquet")
    return {"paths": [path], "format": "parquet", "messages_field": "chat"}


def chats(config: DataConfig, source: dict[str, Any], shards: Path, **fields: Any) -> DataConfig:
    source = {"name": "chat", "content": "conversation", "split": "train"} | source
    update = {"sources": [source], "shards": str(shards)} | fields
    return DataConfig.model_validate(config.model_dump() | update)


@pytest.mark.parametrize("write", [as_json_lines, as_parquet])
def test_every_record_comes_back_from_its_shard(
    config: DataConfig, tmp_path: Path, write: Callable[[Path], dict[str, Any]]
) -> None:
    chat = chats(config, write(tmp_path), tmp_path / "shards")
    manifest = prepare(chat, progress=False)
    tokenizer = Tokenizer(chat.tokenizer.path)
    (shard,) = manifest.shards
    path = tmp_path / "shards" / manifest.folder / shard.name
    records = []
    for ids in open_shard(path, shard.documents, shard.tokens):
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert ids[-2] != tokenizer.eos_id  # an answer's own end is the document's
        records.append(decode(ids[1:].tolist(), tokenizer))
    expected = [read_messages(messages) for messages in RECORDS]
    assert [repr(record) for record in records] == [repr(record) for record in expected]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"chat": RECORDS[0]}, "has no field 'messages'; its fields are chat"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            r"not a conversation: messages\.0: a tool message follows",
        ),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "not a conversation: messages.0: .*robot",
        ),
        ({"messages": "{"}, "its messages are not JSON"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\.0\.user\.content"),
        ({"messages": RECORDS[0][:2]}, "has no answer after its last message"),
        ({"messages": []}, "has no answer after its last message"),
        ({"messages": RECORDS[2], "reasoning_effort": "low"}, "its effort is 'low'; it is one of"),
    ],
)
def test_bad_records(config: DataConfig, tmp_path: Path, content: object, reason: str) -> None:
    good = json.dumps({"messages": RECORDS[1]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{json.dumps(content)}\n{good}\n")
    chat = chats(config, {"paths": [str(tmp_path / "a.jsonl")]}, tmp_path / "shards")
    with pytest.raises(DataError, match=rf"line 2 of .*a\.jsonl .*{reason}") as caught:
        prepare(chat, progress=False)
    assert "\n" not in str(caught.value)
    tolerant = chats(
        chat, chat.sources[0].model_dump(), tmp_path / "shards", max_bad_record_fraction=0.4
    )
    assert prepare(tolerant, progress=False).bad_records == {"chat": 1}


def test_the_effort_and_the_prompts_of_a_source(config: DataConfig, tmp_path: Path) -> None:
    """Other texts are other shards; only the source's own fields and file decide."""
    messages = [*RECORDS[0][:2], {"role": "assistant", "content": "No.", "reasoning_content": "?"}]
    records = [{"messages": messages}, {"messages": messages, "level": "max"}]
    records += [{"messages": messages, "level": "none", "reasoning_effort": "low"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    names = ("TOOLS_TEMPLATE", "response_format_template", "REASONING_EFFORT_MAX")
    texts = ("TOOLS {dsml_token} {tool_schemas}", "FORMAT {schema}", "MAXIMUM ")
    lines = [f"{name} = {text!r}\n" for name, text in zip(names, texts, strict=True)]
    (tmp_path / "encoding.py").write_text("".join(lines))
    source = {"paths": [str(tmp_path / "a.jsonl")], "effort_field": "level"}
    own = prepare(chats(config, source, tmp_path / "shards"), progress=False)
    source |= {"prompts_file": str(tmp_path / "encoding.py")}
    chat = chats(config, source, tmp_path / "shards")
    manifest = prepare(chat, progress=False, overwrite=True)
    assert manifest.digest != own.digest
    assert prepare(chat, progress=False) == manifest
    high, maximum, none = (document.text for document in Corpus(chat.sources[0]))
    head = f"Be brief.\n\nTOOLS ｜DSML｜ {json.dumps(TOOLS[0])}<｜User｜>"
    assert high.startswith(head) and maximum == "MAXIMUM " + high
    assert none == high.replace("<think>?</think>", "</think>")
    (tmp_path / "encoding.py").write_text("".join(lines).replace("FORMAT", "OTHER"))
    other = prepare(chat, progress=False, overwrite=True)
    assert other.digest not in (manifest.digest, own.digest)
    with pytest.raises(ValidationError, match="`prompts_file` needs `content: conversation`"):
        chats(config, source | {"content": "text"}, tmp_path)


def test_a_line_that_is_no_object(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    chat = chats(config, {"paths": [str(tmp_path / "a.jsonl")]}, tmp_path / "shards")
    with pytest.raises(DataError, match="is a number instead of an object"):
        prepare(chat, progress=False)


def test_text_files_hold_no_conversations(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="are read from `format: json` or `parquet`"):
        chats(config, {"paths": ["x"], "format": "text"}, tmp_path)


def test_the_tokenizer_learns_no_special_token(config: DataConfig, tmp_path: Path) -> None:
    """It sees what people and models wrote, not the spellings between."""
    source = as_json_lines(tmp_path)
    chat = chats(config, source, tmp_path / "shards")
    texts = [text for document in Corpus(chat.sources[0]).documents() for text in document.plain]
    written = "".join(texts)
    assert "There it is." in written and "search" in written
    assert written.count("<｜") == 2  # the two that stand in a value and a message
    assert read_messages(json.dumps(RECORDS[0])) == read_messages(RECORDS[0])
    folder = {"path": str(tmp_path / "tok"), "vocab_size": 512, "character_coverage": 1.0}
    train_tokenizer(chats(chat, source, tmp_path / "shards", tokenizer=folder))
    assert "User" not in {Tokenizer(tmp_path / "tok").decode([i]) for i in range(3, 465)}
