"""Turns pydantic's validation errors into one sentence that names file, key and nearest name."""

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config.renamed import replaced_key, replaced_value
from trainer.config.section import section_in
from trainer.config.source import COMMAND_LINE, ConfigError, ConfigSource, Key

_NAMED = re.compile(r"([a-z_]\w*(?:\.\w+)*)(?= (?:=|is|has|\())")
"""A field that a sentence names with its value."""


def explain(error: ValidationError, root: type[BaseModel], source: ConfigSource) -> ConfigError:
    """Returns the ConfigError for the most useful of pydantic's errors.

    An unknown key comes first, since a mistyped name also makes the right one "missing".
    """
    errors = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    key: Key = tuple(first["loc"])
    dotted = ".".join(str(part) for part in key)
    where = source.origin_of(key)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        if (remedy := replaced_key(key)) is not None:
            return ConfigError(f"{where}: the key {dotted!r} {remedy}")
        return ConfigError(f"{where}: unknown key {dotted!r}{_nearest(root, key)}")
    if first["type"] == "missing":
        return ConfigError(f"{where}: {_missing(errors)}")
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        if _is_from_command_line(reason, key, source):
            where = COMMAND_LINE
        return ConfigError(f"{where}: {dotted}: {reason}" if dotted else f"{where}: {reason}")
    if (new_value := replaced_value(key, first["input"])) is not None:
        return ConfigError(f"{where}: {dotted} = {first['input']} is now {new_value}")
    value = "a section" if isinstance(first["input"], dict) else repr(first["input"])
    message = _readable(first["msg"], first.get("ctx", {}))
    remedy = message.removeprefix("Input") if message.startswith("Input ") else f": {message}"
    return ConfigError(f"{where}: {dotted} = {value}{remedy}{more}")


def _missing(errors: list[Any]) -> str:
    """Returns a clause about all keys that are missing."""
    keys = [repr(".".join(map(str, e["loc"]))) for e in errors if e["type"] == "missing"]
    if len(keys) == 1:
        return f"the key {keys[0]} is missing"
    return f"the keys {', '.join(keys[:-1])} and {keys[-1]} are missing"


def _is_from_command_line(reason: str, section: Key, source: ConfigSource) -> bool:
    """Whether a sentence about several fields names one whose value is the command line's.

    Fields are named from the root of the config, or from the section that was checked.
    """
    for name in _NAMED.findall(reason):
        parts: Key = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
        for key in (parts, (*section, *parts)):
            if source.has(key) and source.origin_of(key) == COMMAND_LINE:
                return True
    return False


def _readable(message: str, context: dict[str, Any]) -> str:
    """Returns pydantic's message with a bound such as 1e-30 as people write it."""
    bounds = [context[name] for name in ("ge", "gt", "le", "lt") if name in context]
    if bounds and isinstance(bounds[0], float):
        return f"{message.rpartition(' ')[0]} {bounds[0]:g}"
    return message


def _nearest(root: type[BaseModel], key: Key) -> str:
    """Returns `; did you mean 'model.hidden_size'?`, or the names that are possible there."""
    model = _model_at(root, key[:-1])
    if model is None:
        return ""
    names = list(model.model_fields)
    above = "".join(f"{part}." for part in key[:-1])
    close = difflib.get_close_matches(str(key[-1]), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{above}{close[0]}'?"
    elsewhere = _sections_with(root, str(key[-1]))
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return f"; possible here: {', '.join(names)}"


def _sections_with(root: type[BaseModel], name: str) -> list[str]:
    """Returns dotted keys with the nearest last name, for a field in the wrong section."""
    keys = {name: name for name in root.model_fields}
    for section, field in root.model_fields.items():
        if (model := section_in(field.annotation)) is not None:
            for inner in model.model_fields:
                keys.setdefault(inner, f"{section}.{inner}")
    return [keys[near] for near in difflib.get_close_matches(name, keys, n=1, cutoff=0.6)]


def _model_at(root: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """Returns the pydantic model that the section `key` is read into."""
    model: type[BaseModel] | None = root
    for part in key:
        if isinstance(part, int):
            continue  # an item of a list, whose annotation has its model
        if model is None or part not in model.model_fields:
            return None
        model = section_in(model.model_fields[part].annotation)
    return model
