"""`v4 data report A --compare B`: what differs between two preparations, in one HTML file.

From the manifests alone, so that it takes seconds whatever the shards' size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from data import Manifest
from data.files import write_atomically
from data.manifest import Example, FilterStats
from data.storage import AnyPath
from trainer.formatting import short
from trainer.report.data import CARD_CSS, card, folded, table
from trainer.report.run import CSS

_TOP = 20
_EXAMPLES = 40  # of a filter
_EXAMPLE_CHARACTERS = 400
_CSS = """
.grid th[data-sort] { cursor: pointer; text-decoration: underline dotted; }
input[type=search] { font: inherit; padding: 6px 10px; width: 22em; max-width: 100%;
  border: 1px solid var(--line); border-radius: 6px; background: transparent; color: inherit; }
.scroll { max-height: 75vh; overflow: auto; margin-top: 10px; }
.scroll tr:first-child th { position: sticky; top: 0; background: var(--card); }
"""
_SCRIPT = """
const table = document.querySelector("#all table"), rows = [...table.rows].slice(1);
document.querySelector("#all input").oninput = event => {
  const wanted = event.target.value.toLowerCase();
  for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
};
[...table.rows[0].cells].forEach((head, column) => {
  head.dataset.sort = "";
  let sign = -1;
  head.onclick = () => {
    const text = row => row.cells[column].textContent;
    const value = row => Number(text(row).replace(/[^0-9.-]/g, "") || 0);
    const order = column ? (a, b) => value(a) - value(b) : (a, b) => text(a).localeCompare(text(b));
    rows.sort((a, b) => sign * order(a, b));
    sign = -sign;
    table.tBodies[0].append(...rows);
  };
});
"""


@dataclass
class Side:
    """A source in one of the preparations."""

    train: int = 0
    validation: int = 0
    documents: int = 0
    bytes: int = 0
    dropped: dict[str, FilterStats] = field(default_factory=dict)

    @property
    def dropped_documents(self) -> int:
        """Documents that filters left out."""
        return sum(stats.documents for stats in self.dropped.values())


def write_comparison(one: AnyPath, other: AnyPath) -> AnyPath:
    """Writes `compare.html` into the folder `one` of shards; returns its path.

    Raises DataError where a manifest is missing or damaged.
    """
    page = render(str(one), str(other), Manifest.load(one), Manifest.load(other))
    path = one / "compare.html"
    write_atomically(path, page)
    return path


def sides_of(manifest: Manifest) -> dict[str, Side]:
    """The figures of each source."""
    sides: dict[str, Side] = {}
    for shard in manifest.shards:
        side = sides.setdefault(shard.source, Side())
        side.documents += shard.documents
        side.bytes += shard.bytes
        setattr(side, shard.split, getattr(side, shard.split) + shard.tokens)
    for name, dropped in manifest.dropped.items():
        sides.setdefault(name, Side()).dropped = dropped
    return sides


Sides = dict[str, tuple[Side | None, Side | None]]
_TRAIN = ("train", "training tokens")
_VALIDATION = ("validation", "validation tokens")


def render(a_name: str, b_name: str, a: Manifest, b: Manifest) -> str:
    """Returns the page as HTML text: a summary, the largest changes, then everything."""
    a_sides, b_sides = sides_of(a), sides_of(b)
    sides = {name: (a_sides.get(name), b_sides.get(name)) for name in a_sides | b_sides}
    tokenizers = ""
    if a.tokenizer_hash != b.tokenizer_hash:
        tokenizers = "<p class=note>They were made with different tokenizers: compare bytes.</p>"
    parts = (
        "<h1>Two preparations</h1>"
        f"<p class=sub>A: {escape(a_name)}<br>B: {escape(b_name)}</p>{tokenizers}",
        card("Summary", "", table(("", "A", "B", "B - A"), _summary(sides))),
        card("Settings", _SETTINGS_NOTE, _settings(a, b)),
        card("Largest changes", _changes_note(sides), _largest(sides)),
        card("What the filters left out", _FILTERS_NOTE, _filters(sides)),
        card("Documents that only one left out", _EXAMPLES_NOTE, _examples(sides)),
        card("All sources", _ALL_NOTE, _all(sides)),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(a_name)} and {escape(b_name)}</title>"
        f"<style>{CSS}{CARD_CSS}{_CSS}</style></head><body><main>{''.join(parts)}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


_SETTINGS_NOTE = "Those that decide what shards hold; of the sources, those that both have."
_FILTERS_NOTE = "Over all sources: documents, and megabytes of their text."
_EXAMPLES_NOTE = (
    "Of the examples that the manifests have, up to three for each source and filter, those that "
    "the other preparation does not have."
)
_ALL_NOTE = "Click on a column to sort by it; type to find a source."


def _changes_note(sides: Sides) -> str:
    changed = sum(one != other for one, other in sides.values())
    return (
        f"{changed:,} of {len(sides):,} sources differ. Up to {_TOP} with the largest difference "
        "in training tokens."
    )


def _total(sides: Iterable[Side | None], name: str) -> int:
    return sum(getattr(side, name) for side in sides if side is not None)


def _difference(one: int, other: int) -> str:
    """Returns the text of a difference, with its sign and percentage."""
    if one == other:
        return "0"
    share = f" ({(other - one) / one:+.1%})" if one else ""
    return f"{other - one:+,}{share}"


def _summary(sides: Sides) -> list[tuple[str, ...]]:
    ones, others = [a for a, _ in sides.values()], [b for _, b in sides.values()]
    counts = len([a for a in ones if a]), len([b for b in others if b])
    rows: list[tuple[str, ...]] = [
        ("sources", f"{counts[0]:,}", f"{counts[1]:,}", _difference(*counts))
    ]
    names = (
        *(_TRAIN, _VALIDATION, ("documents", "documents"), ("bytes", "bytes of text")),
        ("dropped_documents", "documents left out by filters"),
    )
    for name, label in names:
        one, other = _total(ones, name), _total(others, name)
        rows.append((label, f"{one:,}", f"{other:,}", _difference(one, other)))
    only_a = sorted(name for name, (_, b) in sides.items() if b is None)
    only_b = sorted(name for name, (a, _) in sides.items() if a is None)
    rows += [
        (f"sources only in {label}", "", "", _names(names))
        for label, names in (("A", only_a), ("B", only_b))
        if names
    ]
    return rows


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return escape(", ".join(names[:5])) + more


def _settings(a: Manifest, b: Manifest) -> str:
    numbers = {name: number for number, name in enumerate(b.settings.get("data.sources", ()))}
    rows = []
    for key, value in a.settings.items():
        other_key, label = key, key
        if key.startswith("data.sources."):
            _, _, number, name = key.split(".", 3)
            source = a.settings["data.sources"][int(number)]
            if source not in numbers:
                continue
            other_key, label = f"data.sources.{numbers[source]}.{name}", f"{source}: {name}"
        elif key == "data.sources":
            continue
        other = b.settings.get(other_key, value)
        if other != value:
            rows.append((escape(label), escape(str(value)), escape(str(other))))
    rows += [
        (escape(key), "-", escape(str(value)))
        for key, value in b.settings.items()
        if key not in a.settings and not key.startswith("data.sources")
    ]
    if not rows:
        return "<p>The same.</p>"
    return folded(("", "A", "B"), rows)


def _row(name: str, one: Side | None, other: Side | None) -> tuple[str, ...]:
    a, b = one or Side(), other or Side()
    where = "" if one and other else " (only A)" if one else " (only B)"
    figures = []
    for left, right in ((a.train, b.train), (a.validation, b.validation)):
        change = f"{right - left:+,}" if right != left else "0"
        figures += [f"{left:,}", f"{right:,}", change]
    return (
        f"{escape(name)}{where}",
        *figures,
        f"{a.dropped_documents:,}",
        f"{b.dropped_documents:,}",
    )


_HEADER = (
    *("source", "training, A", "B", "B - A", "validation, A", "B", "B - A"),
    *("left out, A", "B"),
)


def _change(pair: tuple[Side | None, Side | None]) -> int:
    return (pair[1] or Side()).train - (pair[0] or Side()).train


def _largest(sides: Sides) -> str:
    changed = [item for item in sides.items() if item[1][0] != item[1][1]]
    changed.sort(key=lambda item: -abs(_change(item[1])))
    if not changed:
        return "<p>None: every source has the same figures.</p>"
    rows = []
    for name, pair in changed[:_TOP]:
        a, b = pair[0] or Side(), pair[1] or Side()
        row = _row(name, *pair)
        rows.append(
            (row[0], short(a.train), short(b.train), _difference(a.train, b.train), *row[-2:])
        )
    header = ("source", "training, A", "B", "B - A", "left out, A", "B")
    return table(header, rows)


def _filters(sides: Sides) -> str:
    totals: dict[str, list[FilterStats]] = {}
    for pair in sides.values():
        for number, side in enumerate(pair):
            for reason, stats in (side.dropped if side else {}).items():
                both = totals.setdefault(reason, [FilterStats(), FilterStats()])
                both[number] = both[number].plus(stats)
    if not totals:
        return "<p>Neither has filters, or nothing was left out.</p>"
    rows = [
        (
            escape(reason),
            f"{a.documents:,}",
            f"{b.documents:,}",
            _difference(a.documents, b.documents),
            f"{a.bytes / 1e6:,.2f}",
            f"{b.bytes / 1e6:,.2f}",
        )
        for reason, (a, b) in sorted(
            totals.items(), key=lambda item: -abs(item[1][1].documents - item[1][0].documents)
        )
    ]
    return table(("filter", "documents, A", "B", "B - A", "MB, A", "B"), rows)


def _examples(sides: Sides) -> str:
    """Returns the examples that one side alone has, by filter, folded."""
    by_filter: dict[tuple[str, str], list[tuple[str, Example]]] = {}
    for name, (one, other) in sides.items():
        if one is None or other is None:
            continue
        for label, mine, others in (("A", one, other), ("B", other, one)):
            known = {e.text for stats in others.dropped.values() for e in stats.examples}
            for reason, stats in mine.dropped.items():
                some = [(name, e) for e in stats.examples if e.text not in known]
                by_filter.setdefault((reason, label), []).extend(some)
    html = []
    for (reason, label), examples in sorted(by_filter.items()):
        if not examples:
            continue
        shown = "".join(
            f"<p class=note>{escape(name)}: {escape(example.detail)}</p>"
            f"<pre class=row>{escape(example.text[:_EXAMPLE_CHARACTERS])}</pre>"
            for name, example in examples[:_EXAMPLES]
        )
        count = f"{len(examples):,} example{'s' * (len(examples) != 1)}"
        more = f", {_EXAMPLES} shown" if len(examples) > _EXAMPLES else ""
        html.append(
            f"<details><summary>{escape(reason)}, only {label} left out: {count}{more}</summary>"
            f"{shown}</details>"
        )
    return "".join(html) or "<p>None among the examples.</p>"


def _all(sides: Sides) -> str:
    rows = [_row(name, *pair) for name, pair in sorted(sides.items())]
    body = table(_HEADER, rows)
    return (
        '<div id=all><input type=search placeholder="Find a source" aria-label="Find a source">'
        f"<div class=scroll>{body}</div></div>"
    )
