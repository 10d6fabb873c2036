"""The prompt texts of conversations: the tools section, the response format, the maximum effort.

A released model was trained with DeepSeek's sentences. These here say the same in other words, and
are replaced by DeepSeek's where a source names the encoder of a released folder: a Python file
whose string constants are read and which is never run.
"""

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter

from data.errors import DataError
from data.text.segments import DSML, END_THINK, THINK, Segment, spelled

_TOOLS = """\
## Tools

The tools listed below can be called before answering. Calls are written as one \
"<{dsml_token}tool_calls>" block:

<{dsml_token}tool_calls>
<{dsml_token}invoke name="TOOL">
<{dsml_token}parameter name="PARAMETER" string="true|false">VALUE</{dsml_token}parameter>
...
</{dsml_token}invoke>
...
</{dsml_token}tool_calls>

Strings are written without quotes and with string="true", every other value as JSON and with \
string="false".

After {thinking_start_token}, reason first and close the reasoning with {thinking_end_token}; \
calls and answers follow it.

### Available Tool Schemas

{tool_schemas}

Call no other tools, and pass the parameters that the schemas define.
"""
_RESPONSE_FORMAT = """\
## Response Format:

The answer is JSON that is valid under this schema:
{schema}"""
_MAX_EFFORT = """\
Reasoning effort: maximum.
Think for as long as the problem allows: break it down to its causes, follow every alternative to \
its end, test each step against counterexamples and unusual cases, and write all of it down, \
rejected ideas included, before answering.

"""

_MARKS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": END_THINK}


def _around(template: str, field: str) -> tuple[str, str]:
    """The text before and after the placeholder `field`, the marks filled in."""
    texts = [""]
    for literal, name, spec, conversion in Formatter().parse(template):
        texts[-1] += literal
        if name == field and not spec and not conversion:
            texts.append("")
        elif name in _MARKS and not spec and not conversion:
            texts[-1] += _MARKS[name]
        elif name is not None:
            known = ", ".join(f"{{{n}}}" for n in (field, *_MARKS))
            raise ValueError(f"unknown placeholder {{{name}}}; known are {known}")
    if len(texts) != 2:
        raise ValueError(
            f"a text has {len(texts) - 1} placeholders {{{field}}}; it needs exactly one"
        )
    return texts[0], texts[1]


@dataclass(frozen=True)
class Prompts:
    """The three texts, with placeholders as in the released encoder.

    Attributes:
        tools: the tools section, with `{tool_schemas}` and possibly `{dsml_token}`,
            `{thinking_start_token}` and `{thinking_end_token}`.
        response_format: the text before and after `{schema}`.
        max_effort: what stands before everything else at the maximum effort.

    Raises ValueError for a text with other placeholders, without the one it needs, or that could
    not be recognised in a conversation.
    """

    tools: str = _TOOLS
    response_format: str = _RESPONSE_FORMAT
    max_effort: str = _MAX_EFFORT

    def __post_init__(self) -> None:
        if not self.max_effort:
            raise ValueError("the text of the maximum effort is empty")
        if DSML not in self.around_tools[0] or not self.around_schema[0]:
            raise ValueError("no {dsml_token} before {tool_schemas}, or no text before {schema}")

    @cached_property
    def around_tools(self) -> tuple[list[Segment], list[Segment]]:
        """The segments before and after the schemas of the tools."""
        before, after = _around(self.tools, "tool_schemas")
        return spelled(before), spelled(after)

    @cached_property
    def around_schema(self) -> tuple[list[Segment], list[Segment]]:
        """The segments before and after the schema of the response."""
        before, after = _around(self.response_format, "schema")
        return spelled(before), spelled(after)

    @cached_property
    def before_all(self) -> list[Segment]:
        """The segments of `max_effort`."""
        return spelled(self.max_effort)


OWN_PROMPTS = Prompts()
_CONSTANTS = {
    "TOOLS_TEMPLATE": "tools",
    "response_format_template": "response_format",
    "REASONING_EFFORT_MAX": "max_effort",
}


def read_prompts(file: str | Path) -> Prompts:
    """Reads the texts from a Python file, such as `encoding_dsv4.py` of a released folder.

    They are its constants TOOLS_TEMPLATE, response_format_template and REASONING_EFFORT_MAX, string
    literals at the top level. The file is parsed, not run. Raises DataError where it cannot be
    read, is not Python, lacks a constant, or has one with other placeholders.
    """
    try:
        tree = ast.parse(Path(file).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the prompts file {file}: {error.strerror}.") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"the prompts file {file} is not Python ({' '.join(str(error).split())}); name the "
            "encoder of a released folder, or a file with the same constants."
        ) from error
    texts = {}
    for node in tree.body:
        name = _assigned_name(node)
        value = getattr(node, "value", None)
        if name in _CONSTANTS and isinstance(value, ast.Constant) and isinstance(value.value, str):
            texts[_CONSTANTS[name]] = value.value
    missing = [name for name, field in _CONSTANTS.items() if field not in texts]
    if missing:
        raise DataError(
            f"the prompts file {file} has no string constant {' or '.join(missing)} at its top "
            "level; name the encoder of a released folder, or a file with the same constants."
        )
    try:
        return Prompts(**texts)
    except ValueError as error:
        raise DataError(f"the prompts file {file}: {error}.") from error


def _assigned_name(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return ""
    return target.id if isinstance(target, ast.Name) else ""
