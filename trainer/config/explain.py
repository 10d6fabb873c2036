"""Turns pydantic's validation errors into one sentence that names file, key and nearest name."""

import difflib

from pydantic import BaseModel, ValidationError

from trainer.config.renamed import replaced_key, replaced_value
from trainer.config.section import section_in
from trainer.config.source import ConfigError, ConfigSource, Key


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
        return ConfigError(f"{where}: the key {dotted!r} is missing{more}")
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return ConfigError(f"{where}: {dotted}: {reason}" if dotted else f"{where}: {reason}")
    if (new_value := replaced_value(key, first["input"])) is not None:
        return ConfigError(f"{where}: {dotted} = {first['input']} is now {new_value}")
    value = "a section" if isinstance(first["input"], dict) else repr(first["input"])
    message = first["msg"]
    remedy = message.removeprefix("Input") if message.startswith("Input ") else f": {message}"
    return ConfigError(f"{where}: {dotted} = {value}{remedy}{more}")


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
