"""Shows the reference of the config on the terminal: `v4 config`."""

import sys
from collections.abc import Iterator, Sequence

from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launch.job import ClusterConfig
from trainer.config import FieldReference, Reference, RunConfig, SectionReference

ROOTS: dict[str, type[BaseModel]] = {"": RunConfig, "cluster": ClusterConfig}
"""The kinds of config files, by the key before their sections in the reference."""
FILE_WIDTH = 100


def show(section: str | None, search: str | None) -> None:
    """Prints one section or field, the fields with `search`, or the list of sections.

    Raises ConfigError if there is no such section, or no field is found.
    """
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    reference = Reference(ROOTS)
    if search is not None:
        console.print(*describe_fields(reference.search(search)), sep="\n")
    elif section is not None:
        console.print(*describe_section(reference.section(section)), sep="\n")
    else:
        console.print(list_sections(list(reference.sections.values())))
        console.print("v4 config SECTION shows its fields, v4 config --search WORD finds fields.")


def list_sections(sections: Sequence[SectionReference]) -> Table:
    """Returns the keys of sections and what each is for."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for section in sections:
        table.add_row(section.key, _plain(section.summary))
    return table


def describe_section(section: SectionReference) -> Iterator[RenderableType]:
    """Yields a section's meaning, then its fields."""
    if [field.key for field in section.fields] != [section.key]:
        yield Text.assemble((section.key, "bold"), f": {_plain(section.meaning)}\n")
    yield from describe_fields(section.fields)


def describe_fields(fields: Sequence[FieldReference]) -> Iterator[RenderableType]:
    """Yields each field's key and default, its type and unit, its meaning and its checks."""
    for field in fields:
        default = {"required": "", "": ""}.get(field.default, f" = {field.default}")
        parts = [_plain(field.type), field.unit, "required" * (field.default == "required")]
        facts = ", ".join(text for text in parts if text)
        lines = [Text(_plain(field.meaning))]
        if field.checks:
            lines.append(Text(f"checked: {_plain('; '.join(field.checks))}", style="dim"))
        yield Text.assemble((field.key, "bold"), default, (f"  ({facts})", "cyan"))
        yield Padding(Group(*lines), (0, 0, 0, 4), expand=False)


def _plain(text: str) -> str:
    return text.replace("`", "")
