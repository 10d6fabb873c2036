"""The inverse of rendering: segments to conversations."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from data.errors import DataError
from data.text.conversation import Conversation
from data.text.messages import (
    END_OF_NAME,
    JOIN,
    Assistant,
    Call,
    Developer,
    Effort,
    LatestReminder,
    Message,
    Result,
    System,
    Text,
    User,
    parse_json,
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
    Special,
    flatten,
    is_plain,
)

_RESULT = re.compile(r"(?:\A|(?<=\n\n))<tool_result>(.*?)</tool_result>(?=\n\n|\Z)", re.DOTALL)
_IN_INSTRUCTIONS = (DSML, THINK, END_THINK)  # tokens that the tools section has, no message


def parse(segments: Sequence[Segment], prompts: Prompts = OWN_PROMPTS) -> Conversation:
    """The record that `render` turned into `segments`; DataError for other segments."""
    parser = _Parser(segments, prompts)
    try:
        return parser.conversation()
    except ValidationError as error:
        raise parser.error("a message before it") from error


class _Parser:
    """Reads segments from left to right."""

    def __init__(self, segments: Sequence[Segment], prompts: Prompts) -> None:
        self.segments = list(segments)
        self.prompts = prompts
        self.position = 0
        self.thinks = False  # a turn shows or asks for reasoning
        self.called = False  # the last answer calls tools

    def conversation(self) -> Conversation:
        """The whole record."""
        messages: list[Message] = []
        head = self.instructions()
        paragraph = flatten(self.prompts.before_all)
        has_maximum = head.startswith(paragraph)
        head = head.removeprefix(paragraph)
        if head:
            messages.append(System(**self.split_instructions(head)))
        while self.position < len(self.segments):
            if self.take(REMINDER):
                messages.append(LatestReminder(content=self.plain()))
            elif self.take(USER):
                messages += self.turn()
            else:
                raise self.error("the beginning of a turn")
        effort: Effort = "max" if has_maximum else "high" if self.thinks else "none"
        return Conversation(effort=effort, messages=messages)

    def turn(self) -> list[Message]:
        """A user's turn after its token, and the answers to it."""
        fields = self.split_instructions(self.instructions())
        is_developer = len(fields) > 1
        if self.take(EXTRACTED_URL):
            fields["url"] = self.plain()
        thinks = False
        if self.take(ASSISTANT):
            thinks = self.take(THINK)
            if not thinks:
                self.expect(END_THINK)
            self.thinks = self.thinks or thinks
            fields["task"] = "action" if self.take(TASK_TOKENS["action"]) else None
            is_asked = True
        else:
            tasks = ("query", "authority", "domain", "read_url")
            fields["task"] = next((name for name in tasks if self.take(TASK_TOKENS[name])), None)
            is_asked = fields["task"] is not None
        if is_developer:
            question: Message = Developer(**fields)
        else:
            if self.called:
                fields["content"] = _parts(fields["content"])
            question = User(**fields)
        if not is_asked or self.position == len(self.segments):
            return [question]
        answers = [self.answer(thinks and fields["task"] is None)]
        if answers[0].task is not None and self.position < len(self.segments):
            answers.append(self.answer(thinks=False))
        return [question, *answers]

    def answer(self, thinks: bool) -> Assistant:
        """An answer, after what asks for it."""
        reasoning = None
        if thinks:
            reasoning = self.plain()
            self.expect(END_THINK)
        text = self.plain()
        calls: list[Call] = []
        if self.take(DSML):
            text = self.without(text, "\n\n<")
            tail = self.after(self.plain(), "tool_calls>\n")
            while tail in ("<", "\n<"):
                self.expect(DSML)
                call, tail = self.call()
                calls.append(call)
            if tail != "\n</":
                raise self.error("the end of tool_calls")
            self.expect(DSML)
            self.after(self.plain(), "tool_calls>")
        self.expect(END)
        self.called = bool(calls)
        task: Literal["title"] | None = "title" if self.take(TASK_TOKENS["title"]) else None
        return Assistant(reasoning_content=reasoning, content=text, tool_calls=calls, task=task)

    def call(self) -> tuple[Call, str]:
        """A call after its first DSML token, and the plain text up to the next special token."""
        head = self.after(self.plain(), 'invoke name="')
        tail = "\n</" if head.endswith('">\n\n</') else "<"
        name = self.without(head, '">\n' + tail)
        arguments: dict[str, JsonValue] = {}
        while tail in ("<", "\n<"):
            self.expect(DSML)
            head = self.after(self.plain(), 'parameter name="')
            end = END_OF_NAME.search(head)
            if end is None:
                raise self.error("the name of a parameter")
            value = self.without(head[end.end() :], "</")
            is_string = end[1] == "true"
            arguments[head[: end.start()]] = value if is_string else self.from_json(value)
            self.expect(DSML)
            tail = self.after(self.plain(), "parameter>")
        if tail != "\n</":
            raise self.error("the end of invoke")
        self.expect(DSML)
        return Call(name=name, arguments=arguments), self.after(self.plain(), "invoke>")

    def split_instructions(self, flat: str) -> dict[str, Any]:
        """The content of flat text, and its tools and response format where it has them."""
        fields: dict[str, Any] = {}
        before, after = map(flatten, self.prompts.around_tools)
        content, found, rest = flat.partition(JOIN + before)
        if found:
            fields["tools"], rest = self.schemas(rest, after)
        else:
            content, rest = flat, ""
        before, after = map(flatten, self.prompts.around_schema)
        text, found, schema = (rest or content).rpartition(JOIN + before)
        if found and schema.endswith(after) and (text == "" or not rest):
            try:
                fields["response_format"] = parse_json(schema.removesuffix(after))
            except ValueError:
                pass  # the text only looks like a response format
            else:
                content, rest = (content, "") if rest else (text, "")
        if rest or not is_plain(content):
            raise self.error("plain text before it")
        return {"content": content} | fields

    def schemas(self, flat: str, after: str) -> tuple[list[JsonValue], str]:
        """The tools, one on a line, and the text after their section."""
        tools: list[JsonValue] = []
        position = 0
        while not tools or not flat.startswith(after, position):
            if tools:
                position += 1  # the line break
            try:
                tool, position = json.JSONDecoder().raw_decode(flat, position)
            except ValueError as error:
                raise self.error("the schema of a tool before it") from error
            tools.append(tool)
        return tools, flat[position + len(after) :]

    def error(self, wanted: str) -> DataError:
        """The error for what is next."""
        at_end = self.position == len(self.segments)
        got = "the end" if at_end else repr(self.segments[self.position])
        return DataError(f"segment {self.position} of a conversation is {got}; expected {wanted}.")

    def instructions(self) -> str:
        """The flat text that is next, with the special tokens of a tools section."""
        first = self.position
        while self.position < len(self.segments):
            segment = self.segments[self.position]
            if isinstance(segment, Special) and segment not in _IN_INSTRUCTIONS:
                break
            self.position += 1
        return flatten(self.segments[first : self.position])

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

    def after(self, text: str, head: str) -> str:
        """`text` without `head`, which it has to begin with."""
        if not text.startswith(head):
            raise self.error(f"{head!r} before it")
        return text[len(head) :]

    def without(self, text: str, tail: str) -> str:
        """`text` without `tail`, which it has to end with."""
        if not text.endswith(tail):
            raise self.error(f"{tail!r} before it")
        return text[: -len(tail)]

    def from_json(self, text: str) -> JsonValue:
        """The value of JSON text."""
        try:
            value: JsonValue = parse_json(text)
        except ValueError as error:
            raise self.error("a JSON value") from error
        return value


def _parts(text: str) -> str | list[Text | Result]:
    """The texts and results of a turn; the text itself where there is no result."""
    parts: list[Text | Result] = []
    position = 0
    for match in _RESULT.finditer(text):
        between = text[position : match.start()]
        if between and not (position and between == JOIN):
            parts.append(Text(text=between[len(JOIN) * bool(position) : -len(JOIN)]))
        parts.append(Result(content=match[1]))
        position = match.end()
    if position < len(text):
        parts.append(Text(text=text[position + len(JOIN) * bool(position) :]))
    return parts if position else text
