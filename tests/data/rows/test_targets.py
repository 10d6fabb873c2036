"""Targets of conversations of which only the assistant's tokens are predicted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.prepare.run import prepare
from data.rows import Loader
from data.text.conversation import read_messages
from data.text.dsml import encode
from data.text.tokenizer import Tokenizer
from tests.data.rows.test_loader import epoch_rows
from tests.data.text.test_answers import expected_mask


def turns(number: int) -> list[dict[str, Any]]:
    """A conversation of some turns, longer than a row for large numbers."""
    messages: list[dict[str, Any]] = []
    for turn in range(1 + number % 3):
        question = f"question {number} of {turn} " * (1 + 4 * (number % 5))
        answer = f"answer {turn} to {number} " * (1 + 7 * (number % 4))
        messages += [{"role": "user", "content": question}, {"role": "assistant"}]
        messages[-1] |= {"content": answer, "reasoning_content": "hm " * (number % 2)}
    return messages


@pytest.fixture(scope="module")
def chat(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Shards of conversations and of text; only the assistant's tokens of the first are learned."""
    folder = tmp_path_factory.mktemp("chat")
    lines = [json.dumps({"messages": turns(number)}) + "\n" for number in range(60)]
    (folder / "chat.jsonl").write_text("".join(lines))
    paths = [str(folder / "chat.jsonl")]
    source = {"name": "chat", "content": "conversation", "paths": paths, "split": "train"}
    update = {
        "sources": [source, *config.model_dump()["sources"]],
        "shards": str(folder / "shards"),
        "assistant_only_loss": ["chat"],
        "transforms": {"punctuation_split_rate": 0.3},
    }
    chat = DataConfig.model_validate(config.model_dump() | update)
    prepare(chat, progress=False)
    return chat


def test_only_the_assistant_s_tokens_are_targets(chat: DataConfig, tokenizer: Tokenizer) -> None:
    """Of documents that share rows, and of those that are cut between rows."""
    update = {"fim_rate": 0.0, "punctuation_split_rate": 0.0}
    plain = chat.model_copy(update={"transforms": chat.transforms.model_copy(update=update)})
    actual: Counter[tuple[int, int]] = Counter()
    for tokens, targets, _ in epoch_rows(Loader(plain, seed=3, source="chat")):
        pairs = zip(tokens, targets, strict=True)
        actual.update(pair for pair in pairs if pair[1] != -100)
    expected: Counter[tuple[int, int]] = Counter()
    for number in range(60):
        record = read_messages(turns(number))
        ids = [tokenizer.bos_id, *encode(record, tokenizer)]
        mask = expected_mask(record, tokenizer)
        pairs = zip(itertools.pairwise(ids), mask, strict=True)
        expected.update(pair for pair, is_learned in pairs if is_learned)
    assert actual == expected


def test_other_sources_and_all_inputs_stay(chat: DataConfig) -> None:
    """Tokens are split as well, which moves the turns."""
    everything = chat.model_copy(update={"assistant_only_loss": ()})
    masked, whole = (Loader(one, seed=5) for one in (chat, everything))
    removed = 0
    for step in range(min(masked.num_steps, 20)):
        for ours, theirs in zip(masked.at(step), whole.at(step), strict=True):
            assert ours.tokens.equal(theirs.tokens) and ours.lengths == theirs.lengths
            is_target = ours.targets != -100
            assert ours.targets[is_target].equal(theirs.targets[is_target])
            removed += int((theirs.targets != -100).sum() - is_target.sum())
    assert removed > 100
    text = (Loader(one, seed=5, source="text").at(0) for one in (chat, everything))
    for ours, theirs in zip(*text, strict=True):
        assert ours.targets.equal(theirs.targets)


def test_shards_are_those_of_a_config_without_it(chat: DataConfig) -> None:
    everything = chat.model_copy(update={"assistant_only_loss": ()})
    assert prepare(everything, progress=False) == prepare(chat, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"assistant_only_loss": ["chats"]},
            "names 'chats'; the sources of conversations are chat",
        ),
        ({"assistant_only_loss": ["text"]}, "names 'text'; the sources of conversations are chat"),
        ({"transforms": {"fim_domains": ["prose"]}}, "whose domain prose is in transforms.fim_dom"),
    ],
)
def test_sources_without_turns(chat: DataConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(chat.model_dump() | fields)
