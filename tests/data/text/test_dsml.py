"""DSML: every record comes back, as segments and through the tokenizer's ids."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.text.dsml import (
    QUICK,
    Assistant,
    Call,
    Conversation,
    Message,
    Results,
    Special,
    System,
    User,
    decode,
    encode,
    parse,
    render,
)
from data.text.special_tokens import NAMED
from data.text.tokenizer import Tokenizer

NASTY = [
    *NAMED,
    *(
        '"',
        "\\",
        "\n",
        "\n\n<",
        "</",
        "<｜DSML｜invoke name=",
        "</｜DSML｜parameter>",
        '" string="true">',
    ),
    *("tool_calls>\n", "invoke>", "{}", "null", "1e5", "true", "<a><b>", "▁", "<0x41>", "\x00"),
]
texts = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"])))
).map("".join)
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
calls = st.builds(Call, name=texts, arguments=st.dictionaries(texts, values, max_size=3))
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(System, text=texts, tools=st.lists(values, max_size=2)),
    st.builds(User, text=texts, quick=st.one_of(st.none(), st.sampled_from(QUICK))),
    st.builds(
        Assistant,
        thinking=st.one_of(st.none(), texts),
        text=texts,
        calls=st.lists(calls, max_size=3),
    ),
    st.builds(Results, results=st.lists(texts, min_size=1, max_size=3)),
)
records = st.builds(Conversation, messages=st.lists(messages, max_size=4))


def same(a: Conversation, b: Conversation) -> bool:
    """Equal with the types and the order of keys."""
    return a.model_dump_json() == b.model_dump_json() and repr(a) == repr(b)


@given(records)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_segments_give_the_record_back(record: Conversation) -> None:
    segments = render(record)
    assert same(parse(segments), record)
    assert all(segments)


@given(record=records)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_give_the_record_back(tokenizer: Tokenizer, record: Conversation) -> None:
    assert same(decode(encode(record, tokenizer), tokenizer), record)


def test_written_form(tokenizer: Tokenizer) -> None:
    call = Call(name="f", arguments={"a": "x", "b": [1, "y"]})
    record = Conversation(messages=[User(text="hi<think>"), Assistant(calls=[call, call])])
    invoke = (
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">[1, "y"]</｜DSML｜parameter>\n</｜DSML｜invoke>'
    )
    assert "".join(render(record)) == (
        "<｜User｜>hi<think><｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n"
        f"{invoke}\n{invoke}\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    ids = encode(record, tokenizer)
    assert ids.count(tokenizer.special["<think>"]) == 0  # the user wrote it
    assert ids.count(tokenizer.special["</think>"]) == 1


@pytest.mark.parametrize(
    "segments",
    [
        ["plain"],
        [Special("<｜Assistant｜>"), "x"],
        [
            Special("<｜Assistant｜>"),
            Special("</think>"),
            "x",
            Special("｜DSML｜"),
            "tool_calls>\n",
        ],
        [Special("<｜begin▁sys｜>"), Special("<｜tool▁sep｜>"), "{", Special("<｜end▁sys｜>")],
    ],
)
def test_other_segments_are_one_sentence(segments: list[str]) -> None:
    with pytest.raises(DataError, match=r"segment .* of a conversation is .*; expected") as caught:
        parse(segments)
    assert "\n" not in str(caught.value)
