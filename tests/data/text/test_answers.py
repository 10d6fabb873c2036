"""The assistant's tokens of a conversation, found by its ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from data.errors import DataError
from data.text.answers import Answers
from data.text.conversation import Conversation, read_messages
from data.text.dsml import _answer, encode
from data.text.messages import Assistant
from data.text.segments import encode_segments, merge
from data.text.tokenizer import Tokenizer
from tests.data.text.test_dsml import records


def expected_mask(record: Conversation, tokenizer: Tokenizer) -> list[bool]:
    """By what the renderer writes for each answer, which ends at an eos and has no other."""
    ids = encode(record, tokenizer)
    mask = [False] * len(ids)
    ends = [i + 1 for i, token in enumerate(ids) if token == tokenizer.eos_id]
    answers = [m for m in record.messages if isinstance(m, Assistant)]
    for answer, end in zip(answers, ends, strict=True):
        segments = merge(_answer(answer.model_copy(update={"task": None})))
        (parts,) = encode_segments([segments], tokenizer)
        length = sum(map(len, parts))
        assert ids[end - length : end] == [i for part in parts for i in part.tolist()]
        mask[end - length : end] = [True] * length
    return mask


@given(record=records())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_it_is_what_the_renderer_writes_for_answers(
    tokenizer: Tokenizer, record: tuple[list[dict[str, Any]], str]
) -> None:
    conversation = read_messages(*record)
    ids = np.array(encode(conversation, tokenizer), dtype=np.int32)
    mask = Answers(tokenizer).mask(np.append(tokenizer.bos_id, ids).astype(ids.dtype))
    assert mask.tolist() == [False, *expected_mask(conversation, tokenizer)]


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "</think> one"},
    {"role": "assistant", "content": "two", "reasoning_content": "more"},
    {"role": "user", "content": "three", "task": "action"},
    {"role": "assistant", "content": "Search"},
]


@pytest.mark.parametrize(
    ("effort", "learned"),
    [
        ("none", "two<｜end▁of▁sentence｜>"),
        ("high", "more</think>two<｜end▁of▁sentence｜>"),
        ("max", "more</think>two<｜end▁of▁sentence｜>"),
    ],
)
def test_modes_of_thinking(tokenizer: Tokenizer, effort: str, learned: str) -> None:
    ids = np.array(encode(read_messages(CHAT[:3], effort), tokenizer))
    assert tokenizer.decode(ids[Answers(tokenizer).mask(ids)].tolist()) == learned


def test_the_answer_to_a_task(tokenizer: Tokenizer) -> None:
    ids = np.array(encode(read_messages(CHAT, "none"), tokenizer))
    learned = tokenizer.decode(ids[Answers(tokenizer).mask(ids)].tolist())
    assert learned == "two<｜end▁of▁sentence｜>Search<｜end▁of▁sentence｜>"


def test_a_tokenizer_without_conversations(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {name: i for name, i in tokenizer.special.items() if name != "</think>"}
    monkeypatch.setattr(tokenizer, "special", without)
    with pytest.raises(DataError, match=r"has no special token </think>; conversations need it\.$"):
        Answers(tokenizer)
