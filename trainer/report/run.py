"""`v4 report`: charts and tables of a run in one self-contained HTML file."""

from html import escape
from pathlib import Path
from typing import Any

from data.files import write_atomically
from model.parameters import parameter_counts
from trainer.config import RunConfig, short_length
from trainer.formatting import short
from trainer.metrics import Event, read_events, read_metrics
from trainer.process.errors import ReportError
from trainer.report.layers import events_section, groups_section, layers_section
from trainer.report.plots import CHARTS, Mark, draw, source_charts, task_charts, value_of
from trainer.report.ranks import ranks_section
from trainer.report.samples import samples_section
from trainer.report.tasks import tasks_section

CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --page: #f7f8fa;
  --card: #ffffff; --line: #e4e7ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3;
  --page: #14171c; --card: #1b1f26; --line: #2b313b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
p.sub { margin: 4px 0 28px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile, figure, .facts { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin: 12px 0; }
@media (max-width: 760px) { .charts { grid-template-columns: 1fr; } }
figure { margin: 0; padding: 16px 18px 10px; }
figure.wide { grid-column: 1 / -1; }
figure svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.facts { padding: 16px 18px; columns: 2; column-gap: 40px; }
@media (max-width: 760px) { .facts { columns: 1; } }
.facts section { break-inside: avoid; margin-bottom: 18px; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
td { padding: 4px 0; border-top: 1px solid var(--line); vertical-align: top; }
td:first-child { color: var(--soft); padding-right: 16px; }
th { font-weight: 500; color: var(--soft); text-align: right; padding: 4px 0 6px 12px; }
th:first-child { text-align: left; padding-left: 0; }
.layers td, .layers th { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.layers td:first-child, .layers th:first-child { text-align: left; }
.layers td + td { padding-left: 12px; }
figure p { color: var(--soft); font-size: 13px; margin: 10px 0 4px; }
.events td { padding-right: 16px; }
.events th, .events td, .events td:last-child { text-align: left; }
td.sample { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 12px; }
td:last-child:not(.sample) { text-align: right; font-variant-numeric: tabular-nums;
  word-break: break-word; }
"""


_REQUIRED = {"tokens", "tokens_per_second"}
"""What the report needs of a record; one without it was not written by a training."""


def write_report(config: RunConfig) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    Raises ReportError where the run has no metrics yet.
    """
    path = config.run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    records = [record for record in records if record.keys() >= _REQUIRED]
    if not records:
        raise ReportError(f"{path}: there is nothing to draw; train the run first")
    target = config.run_dir / "report.html"
    events = [event for _, event in read_events(path)]
    write_atomically(target, render(config, records, events))
    return target


def render(config: RunConfig, records: list[dict[str, Any]], events: list[Event]) -> str:
    """Returns the page as HTML text."""
    last = records[-1]
    marks, spikes = phase_marks(config), [event["spike_step"] for event in events]
    charts = "".join(
        f"<figure{' class=wide' if chart.wide else ''}><h2>{escape(chart.title)}</h2>"
        f"{draw(chart, records, marks, spikes)}</figure>"
        for chart in (*CHARTS, *source_charts(records), *task_charts(records))
        if any(value_of(r, curve.key) is not None for curve in chart.curves for r in records)
    )
    tiles = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in _headline(config, records)
    )
    facts = "".join(
        f"<section><h2>{escape(title)}</h2><table>{_rows(rows)}</table></section>"
        for title, rows in _facts(config, last)
    )
    return page(
        str(config.run_dir),
        f"DeepSeek-V4 pre-training, step {last['step']:,} of {config.recipe.steps:,}",
        f"<div class=tiles>{tiles}</div><div class=charts>{charts}</div>"
        f"{events_section(config, records, events)}"
        f"{tasks_section(records)}{samples_section(records)}{ranks_section(records)}"
        f"{layers_section(config, records)}{groups_section(records)}"
        f"<div class=facts>{facts}</div>",
    )


def phase_marks(config: RunConfig) -> list[Mark]:
    """Returns where the phases of a run begin; none for a run without phases."""
    if not config.phases:
        return []
    return [(phase.first, phase.name) for phase in config.recipe.phases]


def page(title: str, subtitle: str, body: str) -> str:
    """Returns an HTML page with `body`, which is HTML already."""
    name = escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{CSS}</style></head><body><main><h1>{name}</h1>"
        f"<p class=sub>{escape(subtitle)}</p>{body}</main></body></html>\n"
    )


def _rows(rows: list[tuple[str, Any]]) -> str:
    return "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows
    )


def _headline(config: RunConfig, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last = records[-1]
    validation = [loss for record in records if (loss := record.get("validation_loss")) is not None]
    speeds = sorted(record["tokens_per_second"] for record in records)
    counts = parameter_counts(config.model)
    loss = last.get("lm_loss")
    tiles = [
        ("parameters", short(counts.total)),
        ("tokens trained on", short(last["tokens"])),
        ("last training loss", "not finite" if loss is None else f"{loss:.4f}"),
        ("tokens per second, median", short(speeds[len(speeds) // 2])),
    ]
    if last.get("rollbacks"):
        tiles.append(("rollbacks", str(last["rollbacks"])))
    if validation:
        tiles.insert(3, ("last validation loss", f"{validation[-1]:.4f}"))
    return tiles


def _facts(config: RunConfig, last: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    model, optim = config.model, config.optim
    counts = parameter_counts(model)
    kinds = [f"{model.layer_types.count(kind)} {kind}" for kind in ("window", "csa", "hca")]
    return [
        (
            "Model",
            [
                ("parameters", f"{counts.total:,}"),
                ("in the MTP block", f"{counts.mtp:,}"),
                ("active per token, without MTP", f"{counts.active:,}"),
                ("vocabulary", f"{model.vocab_size:,}"),
                ("hidden size", model.hidden_size),
                ("layers", f"{model.num_hidden_layers} ({', '.join(kinds)})"),
                ("heads x dimension", f"{model.num_attention_heads} x {model.head_dim}"),
                ("routed experts", model.n_routed_experts),
                ("active routed experts", model.num_experts_per_tok),
                ("residual streams", model.hc_mult),
            ],
        ),
        (
            "Training",
            [
                ("steps", f"{last['step']:,} of {config.recipe.steps:,}"),
                ("tokens", f"{last['tokens']:,}"),
                *_batch_of_phases(config),
                ("peak learning rate", f"{optim.learning_rate:g}"),
                ("precision", config.precision),
                ("seed", config.seed),
            ],
        ),
        (
            "Last step",
            [
                (name.replace("_", " "), number(value))
                for name in _FINAL
                if (value := last.get(name)) is not None
            ],
        ),
    ]


def _batch_of_phases(config: RunConfig) -> list[tuple[str, str]]:
    """Returns the batch of every phase."""
    return [
        (
            f"batch, rows x tokens{phase.name and ', ' + phase.name}",
            f"{phase.rows.global_batch_size} x {short_length(phase.rows.seq_len)}",
        )
        for phase in config.recipe.phases
    ]


_FINAL = (
    "loss",
    "lm_loss",
    "validation_loss",
    "validation_bits_per_byte",
    "mtp_loss",
    "balance_loss",
    "learning_rate",
    "grad_norm",
    "expert_load_max",
    "expert_load_min",
    "tokens_per_second",
    "mfu",
)


def number(value: float) -> str:
    """Formats a number with six significant digits, or thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
