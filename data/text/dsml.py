"""Conversations in DeepSeek-V4's written form, with DSML for tool calls: rendering and parsing.

A conversation is rendered to segments: `Special` for a special token, plain strings for everything
else. The tags of DSML contain the token `｜DSML｜` between plain brackets; since plain text never
encodes to that token, the value of a parameter may contain anything, closing tags included.

`parse` gives back what was rendered. Two marks are plain text in the released form, the tags around
the result of a tool and the heading of the response format: a result with `</tool_result>` in it,
or a system text that ends like a response format, comes back as what it spells.

Certainty: the form is that of the released encoder. Differences: `url` of the task read_url is a
field, since the spelling of a special token in a message stays text; a developer message is never
dropped; a conversation that has no place in the form, such as two answers in a row, is refused.
"""

import json
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from data.text.conversation import Conversation
from data.text.dsml_parser import parse
from data.text.messages import (
    JOIN,
    Assistant,
    Call,
    Developer,
    LatestReminder,
    System,
    Text,
    User,
)
from data.text.prompts import OWN_PROMPTS, Prompts
from data.text.segments import (
    ASSISTANT,
    DSML,
    END,
    END_THINK,
    EXTRACTED_URL,
    REMINDER,
    TASK_TOKENS,
    THINK,
    USER,
    Segment,
    decode_segments,
    encode_segments,
    merge,
)
from data.text.tokenizer import Tokenizer


def render(record: Conversation, prompts: Prompts = OWN_PROMPTS) -> list[Segment]:
    """The segments of a record, without bos; plain ones are merged, and none is empty.

    A record that ends with a user's turn or a task ends with what asks for the answer.
    """
    return merge(_render(record, prompts))


def encode(record: Conversation, tokenizer: Tokenizer, prompts: Prompts = OWN_PROMPTS) -> list[int]:
    """The ids of a record, without bos; DataError where the tokenizer lacks a special token."""
    (ids,) = encode_segments([render(record, prompts)], tokenizer)
    return [int(i) for part in ids for i in part]


def decode(
    ids: Sequence[int], tokenizer: Tokenizer, prompts: Prompts = OWN_PROMPTS
) -> Conversation:
    """The record that `encode` turned into `ids`; DataError for other ids."""
    return parse(decode_segments(ids, tokenizer), prompts)


def _render(record: Conversation, prompts: Prompts) -> Iterator[Segment]:
    if record.effort == "max":
        yield from prompts.before_all
    for number, message in enumerate(record.messages):
        if isinstance(message, System):
            yield message.content
            yield from _extras(message, prompts)
        elif isinstance(message, LatestReminder):
            yield from (REMINDER, message.content)
        elif isinstance(message, Assistant):
            yield from _answer(message)
        else:
            yield from (USER, _turn_text(message))
            if isinstance(message, Developer):
                yield from _extras(message, prompts)
            yield from _question(record, number)


def _extras(message: System | Developer, prompts: Prompts) -> Iterator[Segment]:
    """The tools section and the response format."""
    if message.tools:
        before, after = prompts.around_tools
        yield JOIN
        yield from (*before, "\n".join(map(_json, message.tools)), *after)
    if message.response_format is not None:
        before, after = prompts.around_schema
        yield JOIN
        yield from (*before, _json(message.response_format), *after)


def _turn_text(message: User | Developer) -> str:
    if isinstance(message.content, str):
        return message.content
    return JOIN.join(
        part.text if isinstance(part, Text) else f"<tool_result>{part.content}</tool_result>"
        for part in message.content
    )


def _question(record: Conversation, number: int) -> Iterator[Segment]:
    """What asks for the answer to the user's turn `number`, if it is followed by one."""
    message = record.messages[number]
    assert isinstance(message, User | Developer)
    if isinstance(message, User) and message.url is not None:
        yield from (EXTRACTED_URL, message.url)
    is_last = number == len(record.messages) - 1
    following = None if is_last else record.messages[number + 1]
    if message.task == "action" or (message.task is None and is_last):
        yield from (ASSISTANT, END_THINK if record.effort == "none" else THINK)
    elif message.task is None and isinstance(following, Assistant):
        yield from (ASSISTANT, END_THINK if following.reasoning_content is None else THINK)
    if message.task is not None:
        yield TASK_TOKENS[message.task]


def _answer(message: Assistant) -> Iterator[Segment]:
    if message.reasoning_content is not None:
        yield from (message.reasoning_content, END_THINK)
    yield message.content
    if message.tool_calls:
        yield from ("\n\n<", DSML, "tool_calls>\n")
        for number, call in enumerate(message.tool_calls):
            yield "\n" if number else ""
            yield from _call(call)
        yield from ("\n</", DSML, "tool_calls>")
    yield END
    if message.task is not None:
        yield TASK_TOKENS[message.task]


def _call(call: Call) -> Iterator[Segment]:
    yield from ("<", DSML, f'invoke name="{call.name}">\n')
    for number, (name, value) in enumerate(call.arguments.items()):
        is_string = isinstance(value, str)
        head = f'parameter name="{name}" string="{_json(is_string)}">'
        yield "\n" if number else ""
        yield from ("<", DSML, head, str(value) if is_string else _json(value))
        yield from ("</", DSML, "parameter>")
    yield from ("\n</", DSML, "invoke>")


def _json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
