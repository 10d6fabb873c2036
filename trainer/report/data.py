"""`v4 data report`: contents of the shards and examples of rows, in one HTML file."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from data import Manifest
from data.config import DataConfig
from data.files import sha256_of, write_atomically
from data.rows import Batch, Loader
from data.storage import AnyPath, as_path
from data.text import Tokenizer, tokenizer_file
from trainer.config import RunConfig
from trainer.formatting import short
from trainer.report.data_facts import (
    DataFacts,
    collect,
    longest_tokens,
    measured_mixture,
    most_split_words,
)
from trainer.report.plots import SERIES_COLORS, histogram
from trainer.report.run import CSS
from trainer.run_tokenizer import run_data

_SHOWN_ROWS = 3
_EXAMPLES = 100  # of documents that filters left out
_UNFOLDED = 30  # rows of a table of sources
_SHOWN_TOKENS = 1024  # of a row
CARD_CSS = """
section.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; margin: 12px 0; overflow-x: auto; }
p.note { color: var(--soft); font-size: 13px; margin: 0 0 10px; }
.grid th { text-align: right; color: var(--soft); font-weight: 500; padding: 4px 0 4px 16px; }
.grid td { text-align: right; padding: 4px 0 4px 16px; font-variant-numeric: tabular-nums; }
.grid th:first-child, .grid td:first-child { text-align: left; padding-left: 0; }
.grid td:first-child { color: var(--ink); word-break: break-all; }
code, pre.row { font: 12.5px/1.6 ui-monospace, Menlo, Consolas, monospace; }
code { white-space: pre-wrap; }
pre.row { white-space: pre-wrap; word-break: break-word; margin: 0 0 14px; padding: 10px;
  border: 1px solid var(--line); border-radius: 6px; }
pre.row span.s { border-left: 4px solid var(--c); padding-left: 2px;
  background: color-mix(in srgb, var(--c) 14%, transparent); }
pre.row b { background: #c2185b; color: #fff; border-radius: 3px; padding: 0 3px; }
summary { cursor: pointer; color: var(--soft); margin-top: 12px; }
pre.row i { color: var(--soft); opacity: .75; }
"""


def write_data_report(config: RunConfig) -> AnyPath:
    """Writes `report.html` on the run's first phase into the shards' folder; returns its path.

    Raises DataError where the shards or the tokenizer are missing or damaged.
    """
    data = _data_of_shards(config)
    tokenizer = Tokenizer(data.tokenizer.path)
    rows = [phase.rows for phase in config.recipe.phases]
    facts = collect(data, rows[0].seq_len, tokenizer.vocab_size)
    loader = Loader(data, config.seed, phases=rows)
    target = as_path(config.data.shards) / "report.html"
    write_atomically(target, render(loader, tokenizer, facts))
    return target


def _data_of_shards(config: RunConfig) -> DataConfig:
    """Returns the data config with the run's own tokenizer, if that made the shards."""
    data = run_data(config)
    made_by = Manifest.load(data.shards).tokenizer_hash
    return data if sha256_of(tokenizer_file(data.tokenizer.path)) == made_by else config.data


def render(loader: Loader, tokenizer: Tokenizer, facts: DataFacts) -> str:
    """Returns the page as HTML text; its rows are those of the loader's first phase."""
    name = escape(loader.config.shards)
    length = loader.schedule.phases[0].seq_len
    chart = histogram("Document length", "tokens", _lengths(facts))
    shown, of = facts.words_from, "words of the sampled text"
    parts = (
        f"<h1>{name}</h1><p class=sub>Training data: {len(facts.sources)} sources, rows of "
        f"{length:,} tokens</p><div class=tiles>{_tiles(facts)}</div>",
        card("Sources", _SOURCES_NOTE, _sources(facts)),
        f"<section class=card><h2>Length of documents</h2>{chart}</section>",
        card("Packing into rows", _PACKING_NOTE, _packing(facts)),
        card("Filtered documents", _FILTERS_NOTE, _filters(facts)),
        card("Mixture and transforms in the stream", *_mixture(loader)),
        card("Rows as the model gets them", _ROWS_NOTE, _rows(loader, tokenizer)),
        card(
            "Longest tokens",
            "The 20 tokens of the vocabulary with the most characters, and their occurrences in "
            f"{facts.counted:,} tokens of the shards. Long ones that are common point to "
            "templated text.",
            _pairs(longest_tokens(tokenizer, facts), ("token", "characters", "occurrences")),
        ),
        card(
            "Most-split words",
            f"The 20 {of} ({shown:,} tokens) that take the most tokens, among those that occur "
            "twice or more.",
            _pairs(most_split_words(tokenizer, facts), ("word", "tokens", "occurrences")),
        ),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{CSS}{CARD_CSS}</style></head><body><main>"
        f"{''.join(parts)}</main></body></html>\n"
    )


_SOURCES_NOTE = (
    "Contents of each source. Token counts include the begin- and end-of-document tokens; bytes "
    "are UTF-8 text. Empty documents and bad records are skipped. The share is of all training "
    "tokens."
)
_PACKING_NOTE = (
    "Best fit places whole documents where they fit best and cuts only those longer than a row; "
    "concatenate-and-cut lays documents end to end and cuts wherever a row is full."
)
_FILTERS_NOTE = (
    "Each document is counted under the first filter that it failed; the share is of the source's "
    "text. Below are the first documents of each kind, and the reason."
)
_ROWS_NOTE = (
    "The rows of step 0 that hold the most samples. Each sample has a colour and a bar "
    "at its start; no token sees another sample. Special tokens are in white on "
    "red; faint middle dots separate tokens, ↵ is "
    "the end of a line."
)


def card(title: str, note: str, body: str) -> str:
    """Returns a section; the note and the body are HTML already."""
    return f"<section class=card><h2>{title}</h2><p class=note>{note}</p>{body}</section>"


def _tiles(facts: DataFacts) -> str:
    train = sum(s.train_tokens for s in facts.sources)
    validation = sum(s.validation_tokens for s in facts.sources)
    size = sum(s.bytes for s in facts.sources)
    tiles = (
        (short(train), "training tokens"),
        (short(validation) if validation else "0", "validation tokens"),
        (f"{size / (train + validation):.2f}", "bytes per token"),
        (f"{facts.fill:.2%}", "of row positions filled"),
    )
    return "".join(f"<div class=tile><b>{v}</b><span>{n}</span></div>" for v, n in tiles)


def _sources(facts: DataFacts) -> str:
    total = sum(s.train_tokens for s in facts.sources) or 1
    rows = [
        (
            f"{escape(s.name)} ({escape(s.domain)})",
            f"{s.documents:,}",
            f"{s.empty:,}",
            f"{s.bad:,}",
            f"{sum(stats.documents for stats in s.filtered.values()):,}",
            f"{s.train_tokens:,}",
            f"{s.validation_tokens:,}",
            f"{s.bytes / (s.train_tokens + s.validation_tokens):.2f}",
            f"{s.train_tokens / total:.1%}",
        )
        for s in facts.sources
    ]
    header = (
        *("source", "documents", "empty", "bad", "filtered"),
        *("training", "validation", "bytes/token", "share"),
    )
    return folded(header, rows)


def _filters(facts: DataFacts) -> str:
    """Returns figures by source and filter, and examples."""
    rows: list[tuple[str, ...]] = []
    examples: list[str] = []
    for source in facts.sources:
        total = source.bytes + sum(each.bytes for each in source.filtered.values())
        masked = {"pii (masked, not dropped)": source.masked} if source.masked.documents else {}
        for reason, stats in (source.filtered | masked).items():
            rows.append(
                (
                    f"{escape(source.name)}: {escape(reason)}",
                    f"{stats.documents:,}",
                    f"{stats.bytes / 1e6:,.2f}",
                    f"{stats.bytes / total:.2%}",
                )
            )
            examples += [
                f"<p class=note>{escape(source.name)}, {escape(reason)}: {escape(e.detail)}</p>"
                f"<pre class=row>{escape(e.text)}</pre>"
                for e in stats.examples
            ]
    if not rows:
        return "<p>None: no filter is set, or every document passed.</p>"
    figures = folded(("source: filter", "documents", "MB", "share"), rows)
    return f"{figures}<details><summary>Examples</summary>{''.join(examples[:_EXAMPLES])}</details>"


def _mixture(loader: Loader) -> tuple[str, str]:
    """Returns a note and a table that compare the stream with its configuration."""
    audit = measured_mixture(loader)
    transforms = loader.config.transforms
    rows = []
    for source in loader.config.sources:
        counted = audit.sources.get(source.name)
        if counted is None:
            continue
        fim = transforms.fim_rate if source.domain in transforms.fim_domains else 0.0
        split = f"{counted.split / counted.splittable:.2%}" if counted.splittable else "-"
        rows.append(
            (
                escape(source.name),
                f"{audit.shares[source.name]:.3%}",
                f"{counted.tokens / audit.tokens:.3%}",
                f"{audit.max_deviation[source.name]:.3%}",
                f"{fim:.2%}",
                f"{counted.fim / counted.documents:.2%}" if counted.documents else "-",
                f"{transforms.punctuation_split_rate:.2%}",
                split,
            )
        )
    note = (
        f"Counted in the {audit.tokens:,} tokens of the first {audit.steps} steps, compared with "
        "the configuration (of the first phase). Largest difference: the greatest deviation from "
        f"the configured share in any window of whole steps of about {audit.span_tokens:,} tokens. "
        "FIM: share of documents; split: share of the tokens that join punctuation "
        "and a line break."
    )
    header = (
        *("source", "share, configured", "measured", "largest difference"),
        *("FIM, configured", "measured", "split, configured", "measured"),
    )
    return note, folded(header, rows)


def _packing(facts: DataFacts) -> str:
    rows = [
        ("best fit", f"{facts.rows:,}", f"{facts.fill:.2%}", f"{facts.cut_best_fit:,}"),
        ("concatenate and cut", f"{facts.rows_concatenated:,}", "", f"{facts.cut_concatenated:,}"),
    ]
    return table(("", "rows", "filled", f"documents cut, of {facts.train_documents:,}"), rows)


def _pairs(rows: list[tuple[str, int, int]], header: tuple[str, str, str]) -> str:
    cells = [(f"<code>{_visible(text)}</code>", f"{a:,}", f"{b:,}") for text, a, b in rows]
    return table(header, cells)


def folded(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns a table of the first `_UNFOLDED` rows, and one of the others that is folded."""
    shown = table(header, rows[:_UNFOLDED])
    if len(rows) <= _UNFOLDED:
        return shown
    more = f"{len(rows) - _UNFOLDED:,} more"
    return f"{shown}<details><summary>{more}</summary>{table(header, rows[_UNFOLDED:])}</details>"


def _lengths(facts: DataFacts) -> dict[str, NDArray[np.int64]]:
    """The lengths of documents by source: of many, of the largest ones and of all others."""
    largest = sorted(facts.sources, key=lambda source: -source.train_tokens)
    if len(largest) <= len(SERIES_COLORS):
        return {source.name: source.lengths for source in facts.sources}
    shown, others = largest[: len(SERIES_COLORS) - 1], largest[len(SERIES_COLORS) - 1 :]
    together = np.concatenate([source.lengths for source in others])
    return {s.name: s.lengths for s in shown} | {f"{len(others):,} other sources": together}


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns a table; its cells are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table class=grid><tr>{head}</tr>{body}</table>"


def _visible(text: str) -> str:
    return escape(text).replace("\r", "␍").replace("\n", "↵").replace("\t", "→").replace(" ", "␣")


def _rows(loader: Loader, tokenizer: Tokenizer) -> str:
    """Returns the rows of step 0 with the most samples, a colour for each sample."""
    rows = [
        (batch, b) for batch in loader.at(0) for b in range(len(batch.lengths)) if batch.lengths[b]
    ]
    rows.sort(key=lambda row: -len(row[0].lengths[row[1]]))
    return "".join(_row(batch, b, tokenizer) for batch, b in rows[:_SHOWN_ROWS])


def _row(batch: Batch, b: int, tokenizer: Tokenizer) -> str:
    special = set(tokenizer.special.values())
    lengths = batch.lengths[b]
    tokens = batch.tokens[b].tolist()
    left = _SHOWN_TOKENS
    html = []
    starts = np.cumsum([0, *lengths]).tolist()
    for number, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        ids = tokens[start : start + min(length, left)]
        left -= len(ids)
        if ids:
            color = SERIES_COLORS[number % len(SERIES_COLORS)]
            body = "<i>·</i>".join(_token(i, tokenizer, special) for i in ids)
            html.append(f'<span class=s style="--c:{color}">{body}</span>')
    shown, filled = _SHOWN_TOKENS - left, sum(lengths)
    padding = len(tokens) - filled
    more = f" … {filled - shown:,} more tokens" if filled > shown else ""
    note = (
        f"{len(lengths)} sample{'s' * (len(lengths) > 1)}, {filled:,} tokens, {padding:,} padding"
    )
    return f"<p class=note>{note}</p><pre class=row>{''.join(html)}<i>{more}</i></pre>"


def _token(i: int, tokenizer: Tokenizer, special: set[int]) -> str:
    text = escape(tokenizer.decode([i]))
    if i in special:
        return f"<b>{text}</b>"
    return text.replace("\n", "<i>↵</i>\n")
