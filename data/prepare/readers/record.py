"""A record, before its text is taken out, and what errors about records and files name."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.config import SourceConfig


class Record(NamedTuple):
    """One record.

    Attributes:
        place: where it is, for errors: a line of a file, a row of a table, a file.
        number: the number of the line, row or file in it; of a divided file's lines, in the part.
        value: the object; None where there is a problem.
        problem: why it cannot be read.
    """

    place: str
    number: int
    value: dict[str, Any] | None
    problem: str = ""


class RepeatedKeys(dict[str, Any]):
    """A JSON object that has a key twice: readers differ in which of the values they take.

    Attributes:
        names: the keys.
    """

    names: tuple[str, ...] = ()


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    repeated = RepeatedKeys(value)
    repeated.names = tuple(n for n, count in Counter(n for n, _ in pairs).items() if count > 1)
    return repeated


def name_of(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def field_of(record: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """(the value of a field, ""), or (None, what is missing).

    `a.b` is the field of that name where there is one, otherwise the field b of the object in a.
    """
    if name in record:
        return record[name], ""
    outer, dot, inner = name.partition(".")
    if not dot or outer not in record:
        missing = f"no field {name!r}" if not dot else f"no field {outer!r} with {inner!r} in it"
        return None, f"{missing}; its fields are {', '.join(sorted(record)) or 'none'}"
    if not isinstance(record[outer], dict):
        return None, f"{name_of(record[outer])} instead of an object in the field {outer!r}"
    value, problem = field_of(record[outer], inner)
    return value, f"in {outer!r} {problem}" if problem else ""


def repeated_key(record: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    """A wanted key that a record has twice, or any key that is twice inside a wanted value."""
    for name in wanted:
        outer, _, inner = (name, "", "") if name in record else name.partition(".")
        if outer in getattr(record, "names", ()):
            return outer
        if inner and isinstance(record.get(outer), dict):
            if (key := repeated_key(record[outer], [inner])) is not None:
                return key
        elif outer in record and (key := _repeated_inside(record[outer])) is not None:
            return key
    return None


def _repeated_inside(value: Any) -> str | None:
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, RepeatedKeys):
            return value.names[0]
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return None


def with_remedy(source: SourceConfig, missing: str) -> str:
    """What is wrong with a record that lacks the source's field, and what to set."""
    setting = "messages_field" if source.content == "conversation" else "text_field"
    return f"{missing} (set `{setting}` of source {source.name!r})"


def is_table(source: SourceConfig) -> str:
    """What is wrong with a table among files of another format."""
    return f"is a parquet table; {set_format(source, 'parquet')}"


def set_format(source: SourceConfig, form: str) -> str:
    """How to read files in another format."""
    return f"set `format: {form}` of source {source.name!r}"
