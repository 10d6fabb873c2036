"""The reference of a config, made from its pydantic models and their docstrings. Imports no torch.

    reference = Reference({"": RunConfig})
    reference.section("optim.muon").fields[0].meaning

The string after a field is its meaning, and may end with a unit, as in "Length of a row. [tokens]".
What a value is checked for comes from three places: the field's constraints; the docstrings of the
section's validators, which name its fields in backticks; and lists in the docstrings of the modules
that check across sections, whose items begin with the keys that they are about, in backticks; an
item that begins otherwise is about all its keys.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.section import section_in
from trainer.config.source import ConfigError

CHECKING_MODULES = ("checks", "deepspeed", "operation", "parallel", "quantisation", "recipe")
"""Modules of trainer.config whose docstrings list checks across sections."""
TOP = "run"
"""Name of the section at the top of a run's config."""
_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
_UNIT = re.compile(r"\s*\[([^\[\]`]+)\]$")
_QUOTED = re.compile(r"`([\w.]+)`")
_SUBJECTS = re.compile(r"(?:`[\w.]+`(?:, | and | x )?)+")


@dataclass(frozen=True)
class FieldReference:
    """A field of a section.

    Attributes:
        key: dotted, without numbers of list items, as in `phases.seq_len`.
        default: as in YAML; "required" without one, "" for a section.
        unit: of a number with one, otherwise "".
        checks: what a value is checked for; fields of the same section without its key.
    """

    key: str
    type: str
    default: str
    unit: str
    meaning: str
    checks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last name of the key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class SectionReference:
    """A section of a config, whose `meaning` is its docstring."""

    key: str
    meaning: str
    fields: tuple[FieldReference, ...]

    @property
    def summary(self) -> str:
        """The first sentence of the meaning."""
        return re.split(r"(?<=\.)\s|;", self.meaning)[0].rstrip(".") + "."


class Reference:
    """The sections of config files.

    `roots`: their pydantic models by the key under which they appear, "" for a run's config.
    """

    def __init__(self, roots: Mapping[str, type[BaseModel]]) -> None:
        rules = _rules_across_sections()
        self.sections: dict[str, SectionReference] = {}
        for key, root in roots.items():
            for section in _sections(root, key, rules):
                self.sections[section.key] = section

    @property
    def fields(self) -> list[FieldReference]:
        """The fields of all sections."""
        return [field for section in self.sections.values() for field in section.fields]

    def section(self, key: str) -> SectionReference:
        """Returns the section `key`, or one with the single field `key`.

        Raises ConfigError, with the nearest key, if there is neither.
        """
        if key in self.sections:
            return self.sections[key]
        by_key = {field.key: field for field in self.fields}
        if key in by_key:
            field = by_key[key]
            return SectionReference(key, field.meaning, (field,))
        near = get_close_matches(key, [*self.sections, *by_key], n=1, cutoff=0.0)
        raise ConfigError(f"there is no section or field '{key}'; did you mean '{near[0]}'?")

    def search(self, text: str) -> list[FieldReference]:
        """Returns the fields with `text` in their key or meaning, keys first.

        Raises ConfigError if there are none.
        """
        text = text.lower()
        by_key = [field for field in self.fields if text in field.key.lower()]
        by_meaning = [field for field in self.fields if text in field.meaning.lower()]
        matches = list(dict.fromkeys([*by_key, *by_meaning]))
        if not matches:
            raise ConfigError(f"no field has {text!r} in its name or meaning")
        return matches


def _sections(model: type[BaseModel], key: str, rules: Sequence[str]) -> Iterator[SectionReference]:
    """Yields the section of a model, then those within it, depth first."""
    meanings = _meanings(model)
    own_rules = [inspect.getdoc(v.func) or "" for v in _validators(model)]
    fields, inner = [], []
    for name, info in model.model_fields.items():
        dotted = f"{key}.{name}" if key else name
        meaning, unit = _split_unit(meanings.get(name, ""))
        type_name, constraints = describe(info.annotation)
        if text := _constraint(info):
            constraints.append(text)
        section = section_in(info.annotation)
        checks = [
            *constraints,
            *(_first_paragraph(rule) for rule in own_rules if name in _QUOTED.findall(rule)),
            *(_within(rule, key) for rule in rules if dotted in _subjects(rule)),
        ]
        if section is not None:
            meaning = meaning or _first_paragraph(inspect.getdoc(section) or "")
            inner.append((section, dotted))
        fields.append(
            FieldReference(dotted, type_name, _default(info), unit, meaning, tuple(checks))
        )
    yield SectionReference(key or TOP, _one_line(inspect.getdoc(model) or ""), tuple(fields))
    for section, dotted in inner:
        yield from _sections(section, dotted, rules)


def _validators(model: type[BaseModel]) -> list[Any]:
    decorators = model.__pydantic_decorators__
    return [*decorators.model_validators.values(), *decorators.field_validators.values()]


def describe(annotation: Any) -> tuple[str, list[str]]:
    """Returns the type of an annotation in words, and its constraints."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        name, constraints = describe(inner[0])
        return name, constraints + [text for text in map(_constraint, inner[1:]) if text]
    if origin is Literal:
        return _join([f"`{value}`" for value in inner], "or"), []
    if origin in (Union, UnionType):
        parts = [describe(part) for part in inner if part is not NoneType]
        names = [name for name, _ in parts] + ["null"] * (NoneType in inner)
        return _join(names, "or"), [text for _, texts in parts for text in texts]
    if origin is tuple:
        name, constraints = describe(inner[0])
        count = "list of" if inner[-1] is Ellipsis else f"list of {len(inner)}"
        return f"{count} {_plural(name)}", [f"each {text}" for text in constraints]
    if origin is dict:
        (_, of_names), (name, constraints) = map(describe, inner)
        texts = [f"names: {text}" for text in of_names] + [f"each {text}" for text in constraints]
        return f"mapping from names to {_plural(name)}", texts
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section", []
    return _NAMES.get(annotation, "value"), []


def _plural(name: str) -> str:
    return f"{name}s" if name in ("integer", "number", "path", "section", "value") else name


def _constraint(item: Any) -> str:
    """Returns a constraint in words, "" for what restricts nothing."""
    match item:
        case Gt():
            return f"> {item.gt:g}"
        case Ge():
            return f"≥ {item.ge:g}"
        case Lt():
            return f"< {item.lt:g}"
        case Le():
            return f"≤ {item.le:g}"
        case MinLen():
            return f"at least {item.min_length} item" + "s" * (item.min_length > 1)
        case FieldInfo():
            texts = [text for text in map(_constraint, item.metadata) if text]
            return item.description or ", ".join(texts)
    pattern = getattr(item, "pattern", None)
    return f"matches `{pattern}`" if pattern else ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else _yaml(value)


def _yaml(value: Any) -> str:
    """Returns a default as in YAML."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | tuple():
            return f"[{', '.join(map(_yaml, value))}]"
        case dict():
            return "{" + ", ".join(f"{name}: {_yaml(item)}" for name, item in value.items()) + "}"
    return str(value)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Returns the string after each field of a class."""
    for node in ast.walk(_tree(model.__module__)):
        if isinstance(node, ast.ClassDef) and node.name == model.__name__:
            return {
                field.target.id: _one_line(text.value.value)
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return {}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


def _rules_across_sections() -> list[str]:
    """Returns the items of the lists in the docstrings of CHECKING_MODULES."""
    rules = []
    for name in CHECKING_MODULES:
        for node in ast.walk(_tree(f"{__package__}.{name}")):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                items = re.findall(r"^- (.+(?:\n  .+)*)", text, re.MULTILINE)
                rules += [_one_line(item).rstrip(".") for item in items]
    return rules


def _subjects(rule: str) -> list[str]:
    """Returns the keys that a rule begins with, or all its keys if it begins otherwise."""
    subjects = _SUBJECTS.match(rule)
    return _QUOTED.findall(rule if subjects is None else subjects[0])


def _within(rule: str, key: str) -> str:
    """Returns a rule as a section states it: its own fields without the section's key."""
    return rule.replace(f"`{key}.", "`") if key else rule


def _split_unit(text: str) -> tuple[str, str]:
    """Returns a meaning without its unit, and the unit."""
    unit = _UNIT.search(text)
    return (text, "") if unit is None else (text[: unit.start()], unit[1])


def _first_paragraph(text: str) -> str:
    return _one_line(text.split("\n\n")[0]).rstrip(".")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _join(names: Sequence[str], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}" if len(names) > 1 else names[0]
