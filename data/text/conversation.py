"""Conversations: the messages of a record, checked and brought into the order of the released form.

The messages are those of DeepSeek's encoder, which are OpenAI's: objects with `role`, `content`,
`tools`, `tool_calls`, `reasoning_content` and so on. `read_messages` makes a `Conversation` of
them, without what the written form does not hold: results of tools stand in the user's turn in the
order of the calls, and reasoning only where it is shown.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from data.errors import DataError
from data.text.messages import (
    EFFORTS,
    JOIN,
    Assistant,
    Call,
    Checked,
    Developer,
    Effort,
    LatestReminder,
    Message,
    Result,
    System,
    Text,
    Tool,
    User,
    parse_json,
)

_SURROGATE = re.compile("[\ud800-\udfff]")


class _Record(Checked):
    messages: list[Annotated[Message | Tool, Field(discriminator="role")]]


class Conversation(Checked):
    """One record as `read_messages` returns it.

    Attributes:
        effort: `none` (answers without reasoning), `high`, or `max`, which adds a prompt; `high`
            only where a turn shows or asks for reasoning.
        messages: in their written order; a user's turn holds the results of the tools.
    """

    effort: Effort = "none"
    messages: list[Annotated[Message, Field(discriminator="role")]]

    @property
    def is_answered(self) -> bool:
        """True where the last message is an answer, not a question or a task."""
        last = self.messages[-1] if self.messages else None
        return isinstance(last, Assistant) and last.task is None


def read_messages(content: Any, effort: Any = None) -> Conversation:
    """Reads a list of messages, or its JSON text.

    Arguments:
        content: messages of the roles system, latest_reminder, developer, user, tool, assistant.
        effort: none, high or max; null is high where a message has reasoning, otherwise none.

    Raises DataError for what is not a conversation; the error names the message.
    """
    try:
        messages = parse_json(content) if isinstance(content, str) else content
        record = _Record.model_validate({"messages": messages})
    except ValidationError as error:
        raise DataError(f"is not a conversation: {_first_error(error)}") from error
    except ValueError as error:
        raise DataError(f"is not a conversation: its messages are not JSON ({error})") from error
    for number, message in enumerate(record.messages):
        surrogate = _SURROGATE.search(json.dumps(message.model_dump(), ensure_ascii=False))
        if surrogate:
            raise DataError(
                f"is not a conversation: messages.{number} has the lone surrogate "
                f"U+{ord(surrogate[0]):04X}, which is not valid Unicode text"
            )
    if effort is not None and effort not in EFFORTS:
        raise DataError(
            f"is not a conversation: its effort is {effort!r}; it is one of {', '.join(EFFORTS)}"
        )
    if effort is None:
        reasons = any(isinstance(m, Assistant) and m.reasoning_content for m in record.messages)
        effort = "high" if reasons else "none"
    return _with_reasoning(_turns(record.messages), effort)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        roles = {m.model_fields["role"].default: m for m in (*Message.__args__, Tool)}
        model = next((roles[part] for part in first["loc"] if part in roles), None)
        if model is not None and len(first["loc"]) == 4:
            return f"{place} is no field of it; those are {', '.join(model.model_fields)}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"


def _turns(messages: Sequence[Message | Tool]) -> list[Message]:
    """The messages in their written order, results of tools inside the user's turns.

    Raises DataError for an order that has no written form.
    """
    turns: list[Message] = []
    order: dict[str | None, int] | None = (
        None  # of the last answer's calls, by id; None without calls
    )
    for number, message in enumerate(messages):
        last = turns[-1] if turns else None
        problem = _misplaced(message, last, order is not None, number)
        if problem:
            raise DataError(f"is not a conversation: messages.{number}: {problem}")
        if isinstance(message, Tool):
            message = _result_turn(message, order or {}, number)
        if isinstance(message, User):
            if isinstance(last, User):
                turns.pop()
                message = message.model_copy(update={"content": _parts(last) + _parts(message)})
            message = _ordered(message, order or {})
        elif isinstance(message, Assistant):
            calls = message.tool_calls
            order = _places(calls) if calls else None
            calls = [call.model_copy(update={"id": None}) for call in calls]
            message = message.model_copy(update={"tool_calls": calls})
        turns.append(message)
    return [message for message in map(_simplest, turns) if message != System()]


def _misplaced(message: Message | Tool, last: Message | None, called: bool, number: int) -> str:
    """What is wrong with the place of a message after `last`; "" where nothing is."""
    asked = isinstance(last, User | Developer)
    has_task = isinstance(last, User | Developer | Assistant) and last.task is not None
    if has_task and not isinstance(message, Assistant):
        return "only an assistant message may follow a task, its answer"
    if isinstance(message, System) and number:
        return "a system message may only be the first"
    if isinstance(message, LatestReminder) and asked:
        return "a latest_reminder goes before the user message, not after it"
    if isinstance(message, Tool) and not called:
        return "a tool message follows the assistant message that calls the tool"
    if isinstance(message, Assistant):
        if not asked and not has_task:
            return "an assistant message answers a user, developer or tool message, or a task"
        if has_task and (message.tool_calls or message.task):
            return "the answer to a task is text, without tool_calls or a task"
    return ""


def _result_turn(message: Tool, order: dict[str | None, int], number: int) -> User:
    """The user's turn that a tool message begins or joins."""
    name = message.tool_call_id
    if name is not None and order and name not in order:
        raise DataError(
            f"is not a conversation: messages.{number}: no call before it has the id {name!r}; "
            f"the calls are {', '.join(map(str, order))}"
        )
    try:
        result = Result(content=message.content, tool_use_id=name)
    except ValidationError as error:
        raise DataError(
            f"is not a conversation: messages.{number}.tool.{_first_error(error)}"
        ) from error
    return User(content=[result])


def _places(calls: list[Call]) -> dict[str | None, int]:
    """The place of each call by its id."""
    return {call.id: i for i, call in enumerate(calls) if call.id is not None}


def _parts(message: User) -> list[Text | Result]:
    if isinstance(message.content, str):
        return [Text(text=message.content)]
    return message.content


def _ordered(message: User, order: dict[str | None, int]) -> User:
    """The same turn, its results in the order of the calls at the places of results."""
    results = [part for part in _parts(message) if isinstance(part, Result)]
    if order:
        results.sort(key=lambda result: order.get(result.tool_use_id, 0))
    following = iter(results)
    parts = [next(following) if isinstance(p, Result) else p for p in _parts(message)]
    return message.model_copy(update={"content": parts})


def _simplest(message: Message) -> Message:
    """The message without what is not written: ids, and the borders between texts."""
    if isinstance(message, Developer) and not message.tools and message.response_format is None:
        return User(content=message.content, task=message.task)
    if not isinstance(message, User) or isinstance(message.content, str):
        return message
    parts: list[Text | Result] = []
    for part in message.content:
        if isinstance(part, Result):
            parts.append(Result(content=part.content))
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = Text(text=parts[-1].text + JOIN + part.text)
        else:
            parts.append(part)
    only = parts[0] if len(parts) == 1 else None
    content = only.text if isinstance(only, Text) else parts
    return message.model_copy(update={"content": content})


def _with_reasoning(messages: list[Message], effort: Effort) -> Conversation:
    """The conversation with the reasoning that is shown.

    All of it where a message has tools, otherwise that after the last user's turn; none at the
    effort `none` and in answers to tasks.
    """
    last_turn = max(
        (i for i, m in enumerate(messages) if isinstance(m, User | Developer)), default=-1
    )
    keeps_all = any(isinstance(m, System | Developer) and m.tools for m in messages)
    shown: list[Message] = []
    shows = False
    for number, message in enumerate(messages):
        if isinstance(message, Assistant):
            before = messages[number - 1]
            answers_task = getattr(before, "task", None) is not None
            thinks = effort != "none" and not answers_task and (keeps_all or number > last_turn)
            reasoning = (message.reasoning_content or "") if thinks else None
            message = message.model_copy(update={"reasoning_content": reasoning})
            shows = shows or thinks
        elif isinstance(message, User | Developer):
            is_open = number == len(messages) - 1 and message.task is None
            shows = shows or (effort != "none" and (is_open or message.task == "action"))
        shown.append(message)
    if effort == "high" and not shows:
        effort = "none"
    return Conversation(effort=effort, messages=shown)
