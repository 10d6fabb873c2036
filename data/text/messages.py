"""The messages of a conversation, in the fields of DeepSeek's encoder, which are OpenAI's."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

Effort = Literal["none", "high", "max"]
EFFORTS: tuple[Effort, ...] = ("none", "high", "max")
JOIN = "\n\n"  # between the parts of a turn
# In a written parameter the first of these ends its name.
END_OF_NAME = re.compile(r'" string="(true|false)">')


def parse_json(text: str) -> Any:
    """Returns the value of JSON text. Raises ValueError, also where Python cannot nest as deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Checked(BaseModel):
    """An object of a record: other fields and other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """A field that is null counts as absent."""
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value


class Call(Checked):
    """A tool call: the function's name and the values of its parameters, in order.

    Read from OpenAI's form as well: `{"id", "type": "function", "function": {"name", "arguments"}}`
    with the arguments as JSON text.
    """

    name: str
    arguments: dict[str, JsonValue] = {}
    id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
            return value
        return value["function"] | {k: v for k, v in value.items() if k not in ("type", "function")}

    @field_validator("arguments", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        return parse_json(value) if isinstance(value, str) else value

    @field_validator("arguments")
    @classmethod
    def _has_names(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in value:
            if END_OF_NAME.search(name):
                raise ValueError(f"the parameter's name {name!r} cannot be written")
        return value


class Text(Checked):
    """A part of a user's turn: text."""

    type: Literal["text"] = "text"
    text: str


class Result(Checked):
    """A part of a user's turn: the result of a tool call, a string or several blocks of text."""

    type: Literal["tool_result"] = "tool_result"
    content: str
    tool_use_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if isinstance(value, list):
            return JOIN.join(Text.model_validate(block).text for block in value)
        return value


class _Instructions(Checked):
    """Text with the tools as JSON objects of functions, and the schema of the response."""

    content: str = ""
    tools: list[dict[str, JsonValue]] = []
    response_format: JsonValue = None

    @field_validator("tools", mode="before")
    @classmethod
    def _functions(cls, value: Any) -> Any:
        """Takes the function out of each of OpenAI's tools."""
        if not isinstance(value, list):
            return value
        tools = [t.get("function", t) if isinstance(t, dict) else t for t in value]
        for number, tool in enumerate(tools):
            if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
                raise ValueError(f"tool {number} is no object of a function with a `name`")
        return tools

    @field_validator("response_format")
    @classmethod
    def _is_written(cls, value: JsonValue) -> JsonValue:
        """Null for an empty schema, which is not written."""
        return value or None


class System(_Instructions):
    """The instructions; the first message, if any."""

    role: Literal["system"] = "system"


class LatestReminder(Checked):
    """What the model is reminded of right before a user's turn, such as the date."""

    role: Literal["latest_reminder"] = "latest_reminder"
    content: str


class Developer(_Instructions):
    """A user's turn with tools of its own, as the search agent has it."""

    role: Literal["developer"] = "developer"
    task: Literal["query", "authority", "domain", "action"] | None = None


class User(Checked):
    """A user's turn: text, or texts and results of tools.

    `task` asks for a short answer instead of a reply: a search query, the kind of source or domain
    that it needs, whether to read `url`, or whether to search (action).
    """

    role: Literal["user"] = "user"
    content: str | list[Annotated[Text | Result, Field(discriminator="type")]] = ""
    task: Literal["query", "authority", "domain", "read_url", "action"] | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _has_url_to_read(self) -> "User":
        if (self.task == "read_url") != (self.url is not None):
            raise ValueError("`url` and `task` = read_url need each other")
        return self


class Tool(Checked):
    """The result of a tool call, which becomes part of the user's turn."""

    role: Literal["tool"] = "tool"
    name: str | None = None  # of the function, which the call has
    content: Any = ""
    tool_call_id: str | None = None


class Assistant(Checked):
    """An answer; without reasoning (null) it begins with `</think>`. `task` asks for a title."""

    role: Literal["assistant"] = "assistant"
    reasoning_content: str | None = None
    content: str = ""
    tool_calls: list[Call] = []
    task: Literal["title"] | None = None


Message = System | LatestReminder | Developer | User | Assistant
