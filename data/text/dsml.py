"""DSML, DeepSeek-V4's format of conversations and tool calls: rendering and parsing.

A record is rendered to segments: `Special` for a special token, plain strings for everything else.
Only `Special` becomes a special id, so the spelling of a special token inside a message stays plain
text, and the ids of a record are unambiguous. The tags of DSML contain the token `｜DSML｜` between
plain brackets; since plain text never encodes to that token, a value may contain anything, closing
tags included.

Certainty: the format of tool calls is the report's. Where the tools and their results are placed is
this project's choice, with the report's tokens; the tools are JSON after the system text.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from data.errors import DataError
from data.text.special_tokens import BOS, EOS
from data.text.tokenizer import Tokenizer


class Special(str):
    """The spelling of a special token that stands for the token itself."""

    __slots__ = ()


Segment = str  # plain text, or a Special

USER, ASSISTANT = Special("<｜User｜>"), Special("<｜Assistant｜>")
BEGIN_SYSTEM, END_SYSTEM = Special("<｜begin▁sys｜>"), Special("<｜end▁sys｜>")
THINK, END_THINK = Special("<think>"), Special("</think>")
OUTPUTS, END_OUTPUTS = Special("<｜tool▁outputs▁begin｜>"), Special("<｜tool▁outputs▁end｜>")
OUTPUT, END_OUTPUT = Special("<｜tool▁output▁begin｜>"), Special("<｜tool▁output▁end｜>")
DSML, BEGIN, END, SEPARATOR = (
    Special("｜DSML｜"),
    Special(BOS),
    Special(EOS),
    Special("<｜tool▁sep｜>"),
)
QUICK = ("action", "query", "authority", "domain", "task", "title", "safety", "answer", "search")
QUICK_TOKENS = {name: Special(f"<｜{name}｜>") for name in QUICK}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Call(_Model):
    """A tool call: the tool's name and the values of its parameters, in order."""

    name: str
    arguments: dict[str, JsonValue] = {}


class System(_Model):
    """The instructions, and the tools as JSON objects."""

    role: Literal["system"] = "system"
    text: str = ""
    tools: list[JsonValue] = []


class User(_Model):
    """A message of the user; `quick` names a quick instruction that follows it."""

    role: Literal["user"] = "user"
    text: str
    quick: str | None = Field(default=None, pattern=f"^({'|'.join(QUICK)})$")


class Assistant(_Model):
    """A message of the assistant; without `thinking` it begins with `</think>` (no-think mode)."""

    role: Literal["assistant"] = "assistant"
    thinking: str | None = None
    text: str = ""
    calls: list[Call] = []


class Results(_Model):
    """The results of tools, one text per call."""

    role: Literal["tool"] = "tool"
    results: list[str] = Field(min_length=1)


Message = Annotated[System | User | Assistant | Results, Field(discriminator="role")]


class Conversation(_Model):
    """One record: the messages of a conversation."""

    messages: list[Message]


def read_messages(content: Any) -> Conversation:
    """Validates a list of messages, or its JSON text; DataError where it is not a conversation."""
    try:
        messages = json.loads(content) if isinstance(content, str) else content
        return Conversation.model_validate({"messages": messages})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"is not a conversation: {place}: {first['msg']}") from error
    except ValueError as error:
        raise DataError(f"is not a conversation: its messages are not JSON ({error})") from error


def render(record: Conversation) -> list[Segment]:
    """The segments of a record, without bos; plain ones are merged, and none is empty."""
    merged: list[Segment] = []
    for segment in (piece for message in record.messages for piece in _message(message)):
        plain = not isinstance(segment, Special)
        if plain and merged and not isinstance(merged[-1], Special):
            merged[-1] += segment
        elif segment:
            merged.append(segment)
    return merged


def encode(record: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids of a record, without bos; DataError where the tokenizer lacks a token of DSML."""
    return encode_segments([render(record)], tokenizer)[0]


def encode_segments(
    documents: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> list[list[int]]:
    """The ids of the segments of many documents, on all cores; DataError as for `encode`."""
    plain = [s for segments in documents for s in segments if not isinstance(s, Special)]
    encoded = iter(tokenizer.encode_batch(plain))
    encodings = []
    for segments in documents:
        ids: list[int] = []
        for segment in segments:
            if not isinstance(segment, Special):
                ids += next(encoded)
            elif segment in tokenizer.special:
                ids.append(tokenizer.special[segment])
            else:
                raise DataError(f"{tokenizer.path} has no special token {segment}; DSML needs it.")
        encodings.append(ids)
    return encodings


def decode(ids: Sequence[int], tokenizer: Tokenizer) -> Conversation:
    """The record that `encode` turned into `ids`; DataError for other ids."""
    spellings = {i: Special(token) for token, i in tokenizer.special.items()}
    segments: list[Segment] = []
    plain: list[int] = []
    for i in [*ids, None]:
        if i is not None and i not in spellings:
            plain.append(i)
            continue
        if plain:
            segments.append(tokenizer.decode(plain))
            plain = []
        if i is not None:
            segments.append(spellings[i])
    return parse(segments)


def parse(segments: Sequence[Segment]) -> Conversation:
    """The record that `render` turned into `segments`; DataError for other segments."""
    reader = _Reader(segments)
    messages: list[Any] = []
    while (token := reader.next_special()) is not None:
        if token == BEGIN_SYSTEM:
            messages.append(_parse_system(reader))
        elif token == USER:
            text = reader.plain()
            quick = next((name for name, t in QUICK_TOKENS.items() if reader.take(t)), None)
            messages.append(User(text=text, quick=quick))
        elif token == ASSISTANT:
            messages.append(_parse_assistant(reader))
        elif token == OUTPUTS:
            results = []
            while reader.take(OUTPUT):
                results.append(reader.plain())
                reader.expect(END_OUTPUT)
            reader.expect(END_OUTPUTS)
            messages.append(Results(results=results))
        else:
            raise reader.error("the beginning of a message")
    return Conversation(messages=messages)


def _message(message: Message) -> Iterator[Segment]:
    if isinstance(message, System):
        yield from (BEGIN_SYSTEM, message.text)
        for tool in message.tools:
            yield from (SEPARATOR, _json(tool))
        yield END_SYSTEM
    elif isinstance(message, User):
        yield from (USER, message.text)
        if message.quick is not None:
            yield QUICK_TOKENS[message.quick]
    elif isinstance(message, Results):
        yield OUTPUTS
        for result in message.results:
            yield from (OUTPUT, result, END_OUTPUT)
        yield END_OUTPUTS
    else:
        yield ASSISTANT
        if message.thinking is not None:
            yield from (THINK, message.thinking)
        yield from (END_THINK, message.text)
        if message.calls:
            yield from ("\n\n<", DSML, "tool_calls>\n")
            for number, call in enumerate(message.calls):
                yield "\n" if number else ""
                yield from _call(call)
            yield from ("\n</", DSML, "tool_calls>")
        yield END


def _call(call: Call) -> Iterator[Segment]:
    yield from ("<", DSML, f"invoke name={_json(call.name)}>\n")
    for number, (name, value) in enumerate(call.arguments.items()):
        is_string = isinstance(value, str)
        head = f'parameter name={_json(name)} string="{_json(is_string)}">'
        yield "\n" if number else ""
        yield from ("<", DSML, head, str(value) if is_string else _json(value))
        yield from ("</", DSML, "parameter>")
    yield from ("\n</", DSML, "invoke>")


def _json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class _Reader:
    """Reads segments from left to right."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self.position = 0

    def error(self, wanted: str) -> DataError:
        at_end = self.position == len(self.segments)
        got = "the end" if at_end else repr(self.segments[self.position])
        return DataError(f"segment {self.position} of a conversation is {got}; expected {wanted}.")

    def next_special(self) -> Special | None:
        """The next segment, which is a special token; None at the end."""
        if self.position == len(self.segments):
            return None
        segment = self.segments[self.position]
        if not isinstance(segment, Special):
            raise self.error("a special token")
        self.position += 1
        return segment

    def plain(self) -> str:
        """The plain text that is next, "" where a special token is."""
        if self.position == len(self.segments) or isinstance(self.segments[self.position], Special):
            return ""
        self.position += 1
        return self.segments[self.position - 1]

    def take(self, token: Special) -> bool:
        """Skips `token` if it is next; returns whether it was."""
        following = self.segments[self.position : self.position + 1]
        is_next = following == [token] and isinstance(following[0], Special)
        self.position += is_next
        return is_next

    def expect(self, token: Special) -> None:
        """Skips `token`; DataError where something else is next."""
        if not self.take(token):
            raise self.error(str(token))


def _parse_system(reader: _Reader) -> System:
    text = reader.plain()
    tools = []
    while reader.take(SEPARATOR):
        tools.append(_from_json(reader.plain(), reader))
    reader.expect(END_SYSTEM)
    return System(text=text, tools=tools)


def _parse_assistant(reader: _Reader) -> Assistant:
    thinking = reader.plain() if reader.take(THINK) else None
    reader.expect(END_THINK)
    text = reader.plain()
    calls: list[Call] = []
    if reader.take(DSML):
        text = _without(text, "\n\n<", reader)
        tail = _after(reader.plain(), "tool_calls>\n", reader)
        while tail in ("<", "\n<"):
            reader.expect(DSML)
            call, tail = _parse_call(reader)
            calls.append(call)
        if tail != "\n</":
            raise reader.error("the end of tool_calls")
        reader.expect(DSML)
        _after(reader.plain(), "tool_calls>", reader)
    reader.expect(END)
    return Assistant(thinking=thinking, text=text, calls=calls)


def _parse_call(reader: _Reader) -> tuple[Call, str]:
    """The call after its first DSML token, and the plain text up to the next special token."""
    name, tail = _quoted(_after(reader.plain(), "invoke name=", reader), reader)
    tail = _after(tail, ">\n", reader)
    arguments: dict[str, JsonValue] = {}
    while tail in ("<", "\n<"):
        reader.expect(DSML)
        key, rest = _quoted(_after(reader.plain(), "parameter name=", reader), reader)
        is_string, rest = _quoted(_after(rest, " string=", reader), reader)
        value = _without(_after(rest, ">", reader), "</", reader)
        arguments[key] = value if is_string == "true" else _from_json(value, reader)
        reader.expect(DSML)
        tail = _after(reader.plain(), "parameter>", reader)
    if tail != "\n</":
        raise reader.error("the end of invoke")
    reader.expect(DSML)
    return Call(name=name, arguments=arguments), _after(reader.plain(), "invoke>", reader)


def _after(text: str, head: str, reader: _Reader) -> str:
    if not text.startswith(head):
        raise reader.error(f"{head!r} before it")
    return text[len(head) :]


def _without(text: str, tail: str, reader: _Reader) -> str:
    if not text.endswith(tail):
        raise reader.error(f"{tail!r} before it")
    return text[: -len(tail)]


def _quoted(text: str, reader: _Reader) -> tuple[str, str]:
    """The JSON string at the beginning of `text`, and the rest."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except ValueError as error:
        raise reader.error("a quoted name") from error
    return str(value), text[end:]


def _from_json(text: str, reader: _Reader) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
    except ValueError as error:
        raise reader.error("a JSON value") from error
    return value
