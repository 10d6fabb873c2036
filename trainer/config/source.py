"""Reads config files: YAML, `base:` inheritance, command-line overrides.

The result is a plain dictionary and the origin of every key, so that an error can name the file, or
the command line, with the wrong key.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]
Defaults = Mapping[str, Mapping[str, Any]]
"""Values of a config, by the file that they come from."""
COMMAND_LINE = "command line"

# YAML 1.1, which PyYAML follows, reads `1e-20` as a string, `no` and `off` as False and `010` as 8.
# These are the scalars of YAML 1.2 instead, with `_` allowed between digits.
_SCALARS = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
            r"|[0-9][0-9_]*\.?[eE][-+]?[0-9]+|[0-9][0-9_]*\.|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
        "-+0123456789.",
    ),
)


class ConfigError(ValueError):
    """A config that cannot be used; the message is one sentence."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: Resolvers = {}  # noqa: RUF012 - PyYAML's own declaration

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is no string, and one that is repeated.

        The second value of a repeated key would silently replace the first.
        """
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} should be a name", key_node.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: Resolvers = {}  # noqa: RUF012 - PyYAML's own declaration


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def parse_yaml(text: str, origin: str) -> Any:
    """Returns the value of a YAML text. Raises ConfigError with the line of a syntax error."""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)  # ends at an alias to what contains it
        return value
    except RecursionError:
        raise ConfigError(f"{origin}: is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from None


def dump_yaml(value: Any) -> str:
    """Returns YAML text that `parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class ConfigSource:
    """The merged dictionary of a config, and the origin of each of its keys."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._origins: dict[Key, str] = {}

    def origin_of(self, key: Key) -> str:
        """Returns the file, or "command line", that set `key` or the nearest key above it."""
        for length in range(len(key), -1, -1):
            if (origin := self._origins.get(tuple(key[:length]))) is not None:
                return origin
        return "config"

    def has(self, key: Key) -> bool:
        """Whether there is a value at `key`."""
        node: Any = self.values
        for part in key:
            if isinstance(node, list):
                node = dict(enumerate(node))
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def merge(self, values: Mapping[str, Any], origin: str) -> None:
        """Merges `values` into those so far: sections merge, everything else is replaced."""
        self._origins.setdefault((), origin)
        self._merge(self.values, values, (), origin)

    def _merge(self, into: dict[str, Any], values: Mapping[str, Any], at: Key, origin: str) -> None:
        for name, value in values.items():
            key = (*at, name)
            if isinstance(value, Mapping):
                if not isinstance(into.get(name), dict):
                    into[name] = {}
                    self._origins[key] = origin
                self._merge(into[name], value, key, origin)
                continue
            into[name] = value
            self._origins[key] = origin

    def override(self, assignment: str) -> None:
        """Applies one `key.sub=value` of the command line; an item of a list has its number as key.

        Raises ConfigError if the text has no `=` or a list item does not exist.
        """
        dotted, equals, text = assignment.partition("=")
        names = dotted.split(".")
        if not equals or not all(names):
            raise ConfigError(
                f"{COMMAND_LINE}: {assignment!r} should read key=value, such as steps=100"
            )
        value = parse_yaml(text, f"{COMMAND_LINE}, {dotted}")
        self._set(names, value, dotted)

    def _set(self, names: list[str], value: Any, dotted: str) -> None:
        node: Any = self.values
        slots: list[str | int] = []
        for i, name in enumerate(names):
            slots.append(self._slot(node, name, dotted, ".".join(names[:i])))
            if i == len(names) - 1:
                break
            inner = node.get(name) if isinstance(node, dict) else node[slots[-1]]
            if not isinstance(inner, dict | list):
                inner = node[slots[-1]] = {}
                self._origins[tuple(slots)] = COMMAND_LINE
            node = inner
        node[slots[-1]] = value
        self._origins[tuple(slots)] = COMMAND_LINE

    @staticmethod
    def _slot(node: Any, name: str, dotted: str, above: str) -> str | int:
        if not isinstance(node, list):
            return name
        if not (name.isdecimal() and int(name) < len(node)):
            raise ConfigError(
                f"{COMMAND_LINE}: {dotted}: {name!r} should be the number of an item of {above}, "
                f"0 to {len(node) - 1}"
            )
        return int(name)


def read_source(
    path: Path, overrides: Iterable[str] = (), defaults: Defaults | None = None
) -> ConfigSource:
    """Reads a config file, the files that its `base:` names (relative to it), and the overrides.

    All of them take precedence over `defaults`.

    Raises ConfigError for a missing or unreadable file, circular bases, wrong overrides, and a path
    that is not UTF-8.
    """
    overrides = list(overrides)
    require_unicode([os.path.abspath(path), *overrides])
    source = ConfigSource()
    for origin, values in (defaults or {}).items():
        source.merge(values, origin)
    for file, values in _chain(Path(path), []):
        source.merge(values, str(file))
    source._origins[()] = str(path)
    for assignment in overrides:
        source.override(assignment)
    return source


def require_unicode(words: Iterable[str]) -> None:
    """Raises ConfigError for a word of a command line, such as a path, that is not UTF-8.

    Configs, manifests and the headers of checkpoints, which have such paths, are.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{COMMAND_LINE}: {word!r} is not UTF-8; rename the file or folder"
            ) from None
        if "\0" in word:
            raise ConfigError(f"{COMMAND_LINE}: {word!r} has a NUL, which no path can have")


def _chain(path: Path, children: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the values of the file's bases, farthest first, then those of the file."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: base: the files inherit from each other in a circle")
    values = read_yaml_mapping(path)
    base = values.pop("base", None)
    if base is None:
        return [(path, values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r} should be the path of another config file")
    of_bases = _chain(path.parent / os.path.expanduser(base), [*children, path.resolve()])
    return [*of_bases, (path, values)]


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises ConfigError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config should be a mapping of names to values")
    return values
