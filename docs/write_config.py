"""Writes the reference of the config, config.md: python docs/write_config.py."""

from __future__ import annotations

import re
from pathlib import Path

from launch.show_config import ROOTS
from trainer.config import FieldReference, Reference, SectionReference

TARGET = Path(__file__).parent / "config.md"
INTRODUCTION = """\
# The configuration

Every field of a run's config and of a cluster file: look here for what a setting means, its
default, and what it is checked for. A run is one YAML file. It can inherit from another one, and
the command line overrides single fields:

```yaml
# my-run.yaml
base: configs/debug.yaml
run_dir: runs/my-run
steps: 40
optim:
  learning_rate: 2e-3
```

```bash
v4 train my-run.yaml optim.muon.momentum=0.9 data.micro_batch_size=2
v4 config optim.muon           # this page for one section, on the terminal
v4 config --search momentum    # the fields with a word in their name or meaning
```

Sections of a file merge with those of its `base`; lists are replaced. On the command line, an item
of a list has its number in the key, as in `data.sources.0.name=code`. An unknown key, a wrong type
or a value that contradicts another one is refused before anything starts, in one sentence that
names the key, the value and the remedy. A `~` at the start of a path is the home folder. The
resolved config is written to `config.yaml` in the run folder. Scalars are those of YAML 1.2: `1e-3`
is a number, `no` is text, `null` is no value.

This page is made from the code by `python docs/write_config.py`.
"""


def page() -> str:
    """Returns the whole page."""
    sections = list(Reference(ROOTS).sections.values())
    index = "\n".join(f"| {_link(section)} | {section.summary} |" for section in sections)
    parts = [INTRODUCTION, f"| section | contents |\n|---|---|\n{index}\n"]
    return "\n".join(parts + [_section(section) for section in sections])


def _anchor(key: str) -> str:
    return "#" + key.replace(".", "")


def _link(section: SectionReference) -> str:
    return f"[`{section.key}`]({_anchor(section.key)})"


def _link_pages(text: str) -> str:
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)


def _section(section: SectionReference) -> str:
    header = "| field | type | default | unit | meaning | checked |\n|---|---|---|---|---|---|"
    rows = "\n".join(_row(field) for field in section.fields)
    return f"## {section.key}\n\n{_link_pages(section.meaning)}\n\n{header}\n{rows}\n"


def _row(field: FieldReference) -> str:
    default = field.default
    if default not in ("", "required"):
        default = f"`{default}`"
    checks = "; ".join(field.checks)
    kind = re.sub(r"sections?", rf"[\g<0>]({_anchor(field.key)})", field.type)
    cells = (f"`{field.name}`", kind, default, field.unit, _link_pages(field.meaning), checks)
    return f"| {' | '.join(cells)} |".replace(" |  |", " | |").replace(" |  |", " | |")


def main() -> None:
    """Writes config.md next to this file."""
    TARGET.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
