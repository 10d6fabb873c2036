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
from data.text.dsml import Conversation, decode, read_messages
from data.text.tokenizer import Tokenizer

TOOLS = [{"name": "search", "parameters": {"query": {"type": "string"}}}]
RECORDS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "text": "Be brief.", "tools": TOOLS},
        {"role": "user", "text": "Find <｜DSML｜ and\u2028</think>"},
        {
            "role": "assistant",
            "thinking": "a search",
            "calls": [
                {"name": "search", "arguments": {"query": '"x" <｜DSML｜parameter>', "n": 3}},
                {"name": "other", "arguments": {"deep": {"list": [1, None, "s"]}, "on": True}},
            ],
        },
        {"role": "tool", "results": ["found", ""]},
        {"role": "assistant", "text": "There it is."},
    ],
    [{"role": "user", "text": "hi", "quick": "title"}, {"role": "assistant", "text": "Greeting"}],
    [{"role": "user", "text": "a record that ends with the user"}],
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
        body = ids[1:].tolist()
        answered = body.count(tokenizer.special["<｜Assistant｜>"])
        records.append(decode(body if answered else body[:-1], tokenizer))
    expected = [Conversation.model_validate({"messages": messages}) for messages in RECORDS]
    assert [repr(record) for record in records] == [repr(record) for record in expected]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"chat": RECORDS[0]}, "has no list of messages in the field 'messages'; .* chat"),
        (
            {"messages": [{"role": "tool", "results": []}]},
            r"not a conversation: messages\.0\.tool",
        ),
        (
            {"messages": [{"role": "robot", "text": "x"}]},
            "not a conversation: messages.0: .*robot",
        ),
        ({"messages": "{"}, "its messages are not JSON"),
        ({"messages": [{"role": "user", "text": 3}]}, r"messages\.0\.user\.text"),
    ],
)
def test_bad_records(config: DataConfig, tmp_path: Path, content: object, reason: str) -> None:
    good = json.dumps({"messages": RECORDS[1]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{json.dumps(content)}\n{good}\n")
    chat = chats(config, {"paths": [str(tmp_path / "a.jsonl")]}, tmp_path / "shards")
    with pytest.raises(DataError, match=rf"record 2 of .*a\.jsonl .*{reason}") as caught:
        prepare(chat, progress=False)
    assert "\n" not in str(caught.value)
    tolerant = chats(
        chat, chat.sources[0].model_dump(), tmp_path / "shards", max_bad_record_fraction=0.4
    )
    assert prepare(tolerant, progress=False).bad_records == {"chat": 1}


def test_a_line_that_is_no_object(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n")
    chat = chats(config, {"paths": [str(tmp_path / "a.jsonl")]}, tmp_path / "shards")
    with pytest.raises(DataError, match="is a list instead of an object"):
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
