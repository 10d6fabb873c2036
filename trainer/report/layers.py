"""The report's sections about spikes, layers and groups of weights."""

from html import escape
from typing import Any

from trainer.config import RunConfig
from trainer.metrics.jsonl import Event
from trainer.report.plots import draw_layers

Records = list[dict[str, Any]]
Columns = tuple[tuple[str, str, str], ...]
"""Name in the record, heading, and what it means."""

_ROUTING: Columns = (
    ("expert_load_max", "busiest expert", "its tokens over the mean of all experts; 1 is even"),
    ("expert_load_entropy", "evenness", "entropy of the loads over that of even ones; 1 is even"),
    ("experts_dead", "idle experts", "share of the experts that no token went to"),
    ("router_bias_min", "least bias", "what the router adds to the scores to even the loads out"),
    ("router_bias_max", "largest bias", "the same"),
)
_INSIDE: Columns = (
    ("clamped", "clamped", "share of the experts' inner values that SwiGLU's clamp changes"),
    ("swiglu_max", "largest inner value", "before the clamp"),
    ("stream_rms", "streams", "root mean square of the residual streams behind the layer"),
    ("stream_max", "largest in streams", "largest magnitude in them"),
    (
        "comb_departure",
        "mixing off by",
        "how far rows and columns of the matrices that mix the streams are from summing to 1",
    ),
    (
        "indexer_recall",
        "kept by the index",
        "of the attention to all entries, the share of those that the indexer keeps",
    ),
    ("sink_min", "least sink", "logit of a head that stands for attending to nothing"),
    ("sink_max", "largest sink", "the same"),
)
_MAPS = (
    ("expert_load_max", "Busiest expert of every layer", "load over the mean"),
    ("clamped", "Inner values that SwiGLU's clamp changes", "share"),
    ("stream_rms", "Residual streams behind every layer", "root mean square"),
)


def events_section(config: RunConfig, records: Records, events: list[Event]) -> str:
    """What was seen and what was done about it; a sentence where nothing was."""
    if not events:
        if config.stability.spikes is None:
            return ""
        return _figure("Spikes", "<p>No step was a spike; the run never turned back.</p>")
    rows = "".join(
        f"<tr><td>{event['seen_at']:,}</td><td>{escape(event['what'])}</td>"
        f"<td>{escape(_done(event))}</td></tr>"
        for event in events
    )
    left = sum("loss" not in record for record in records)
    routed = sum(bool(record.get("anticipates")) for record in records)
    below = (
        f"<p>Steps without an update: {left}. Steps in which tokens went to the experts that older "
        f"weights chose (anticipatory routing): {routed}. The charts have a dashed line where a "
        "spike was seen; steps that came again are shown as they were the last time.</p>"
    )
    head = "<tr><th>step</th><th>what was seen</th><th>what was done</th></tr>"
    return _figure("Spikes", f"<table class=events>{head}{rows}</table>{below}")


def _done(event: Event) -> str:
    if event["stopped"] is not None:
        return f"the run ended: {event['stopped']}"
    parts = [f"back to the state after step {event['back_to']:,}"]
    if event["left_out"] is not None:
        parts.append(f"batch of step {event['left_out']:,} left out")
    if event["anticipation_until"] is not None:
        parts.append(f"anticipatory routing to step {event['anticipation_until']:,}")
    return "; ".join(parts)


def layers_section(config: RunConfig, records: Records) -> str:
    """Maps of some numbers over time, and tables of every layer at the last look."""
    seen = [record for record in records if "layers" in record]
    if not seen:
        return ""
    numbers, step = seen[-1]["layers"], seen[-1]["step"]
    drawn = [entry for entry in _MAPS if all(entry[0] in record["layers"] for record in seen)]
    maps = "".join(
        _figure(title, draw_layers(seen, name, title, unit))
        for name, title, unit in drawn
        if any(any(record["layers"][name]) for record in seen)  # not where it was 0 throughout
    )
    return maps + "".join(
        _figure(f"{title} after step {step:,}", _table(config, numbers, columns))
        for title, columns in (("Routing", _ROUTING), ("Inside the layers", _INSIDE))
    )


def _table(config: RunConfig, numbers: dict[str, list[float | None]], columns: Columns) -> str:
    columns = tuple(column for column in columns if column[0] in numbers)
    kinds = [*config.model.layer_types, *["window"] * config.model.num_nextn_predict_layers]
    head = "<th>layer</th>" + "".join(f"<th>{escape(label)}</th>" for _, label, _ in columns)
    body = ""
    for row, kind in enumerate(kinds):
        place = "MTP" if row >= config.model.num_hidden_layers else str(row)
        router = "hash" if row < config.model.num_hash_layers else "learned"
        cells = [numbers[name][row] for name, _, _ in columns]
        body += f"<tr><td>{place}: {kind}, {router}</td>" + "".join(
            f"<td>{'–' if cell is None else f'{cell:.3g}'}</td>" for cell in cells
        )
        body += "</tr>"
    meanings = "; ".join(
        f"<b>{escape(label)}</b>: {escape(what)}"
        for _, label, what in columns
        if what != "the same"
    )
    return f"<table class=layers><tr>{head}</tr>{body}</table><p>{meanings}.</p>"


def groups_section(records: Records) -> str:
    """How far the last update that was looked at moved the weights of every group."""
    seen = [record for record in records if record.get("groups")]
    if not seen:
        return ""
    numbers, step = seen[-1]["groups"], seen[-1]["step"]
    rows = "".join(
        f"<tr><td>{escape(group.replace('_', ' '))}</td><td>{update:.3g}</td>"
        f"<td>{numbers['weight_norm'][group]:.4g}</td></tr>"
        for group, update in numbers["update_rms"].items()
    )
    head = "<tr><th>weights</th><th>change in the step, RMS</th><th>norm</th></tr>"
    return _figure(f"Weights in step {step:,}", f"<table class=layers>{head}{rows}</table>")


def _figure(title: str, body: str) -> str:
    return f"<div class=charts><figure class=wide><h2>{escape(title)}</h2>{body}</figure></div>"
