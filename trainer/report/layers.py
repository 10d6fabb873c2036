"""The report's sections on loss spikes, layers and parameter groups."""

from html import escape
from typing import Any

from trainer.config import RunConfig
from trainer.metrics import Event
from trainer.report.plots import draw_layers

Records = list[dict[str, Any]]
Columns = tuple[tuple[str, str, str], ...]
"""Key in the record, heading, and meaning."""

_ROUTING: Columns = (
    (
        "expert_load_max",
        "max load",
        "the most loaded expert over the mean; 1 is balanced",
    ),
    ("expert_load_entropy", "load entropy", "over that of balanced loads; 1 is balanced"),
    ("dead_expert_share", "dead experts", "fraction of experts without a token"),
    ("router_bias_min", "min bias", "added to the router's scores to balance the loads"),
    ("router_bias_max", "max bias", "the same"),
)
_INSIDE: Columns = (
    (
        "swiglu_clamped_share",
        "clamped",
        "fraction of the experts' SwiGLU inputs that the clamp changes",
    ),
    ("swiglu_max", "max SwiGLU input", "before the clamp"),
    ("stream_rms", "stream RMS", "of the residual streams after the layer"),
    ("stream_max", "stream max", "largest magnitude in the residual streams"),
    (
        "comb_sum_error",
        "mixing error",
        "largest deviation of row and column sums of the stream mixing matrices from 1",
    ),
    (
        "indexer_recall",
        "indexer recall",
        "fraction of the attention to all entries that falls on the selected ones",
    ),
    ("sink_min", "min sink", "logit of a head's attention sink"),
    ("sink_max", "max sink", "the same"),
)
_MAPS = (
    ("expert_load_max", "Most loaded expert of each layer", "load / mean load"),
    ("swiglu_clamped_share", "Clamped SwiGLU inputs of each layer", "fraction"),
    ("stream_rms", "Residual streams after each layer", "RMS"),
)


def events_section(config: RunConfig, records: Records, events: list[Event]) -> str:
    """Returns the table of spikes and rollbacks; a sentence if there were none."""
    if not events:
        if config.stability.spikes is None:
            return ""
        return _figure("Spikes", "<p>No spikes; the run never rolled back.</p>")
    rows = "".join(
        f"<tr><td>{event['spike_step']:,}</td><td>{escape(event['reason'])}</td>"
        f"<td>{escape(_action(event))}</td></tr>"
        for event in events
    )
    skipped = sum(not record["tokens_per_second"] for record in records)
    routed = sum(bool(record.get("anticipatory_routing")) for record in records)
    below = (
        f"<p>Skipped batches: {skipped}. Steps with anticipatory routing (experts selected by "
        f"older weights): {routed}. A dashed line in the charts marks a spike; repeated steps "
        "are shown as they were the last time.</p>"
    )
    head = "<tr><th>step</th><th>problem</th><th>action</th></tr>"
    return _figure("Spikes", f"<table class=events>{head}{rows}</table>{below}")


def _action(event: Event) -> str:
    if event["stop_reason"] is not None:
        return f"the run ended: {event['stop_reason']}"
    parts = [f"rolled back to the state after step {event['restored_step']:,}"]
    if event["skipped_batch"] is not None:
        parts.append(f"batch of step {event['skipped_batch']:,} skipped")
    if event["anticipation_end"] is not None:
        parts.append(f"anticipatory routing to step {event['anticipation_end']:,}")
    return "; ".join(parts)


def layers_section(config: RunConfig, records: Records) -> str:
    """Returns heat maps over the run, and tables of all layers at the last collected step."""
    sampled = [record for record in records if "layers" in record]
    if not sampled:
        return ""
    numbers, step = sampled[-1]["layers"], sampled[-1]["step"]
    drawn = [entry for entry in _MAPS if all(entry[0] in record["layers"] for record in sampled)]
    maps = "".join(
        _figure(title, draw_layers(sampled, name, title, unit))
        for name, title, unit in drawn
        if any(any(record["layers"][name]) for record in sampled)  # not if 0 throughout
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
    for layer, kind in enumerate(kinds):
        place = "MTP" if layer >= config.model.num_hidden_layers else str(layer)
        router = "hash" if layer < config.model.num_hash_layers else "learned"
        cells = [numbers[name][layer] for name, _, _ in columns]
        body += f"<tr><td>{place}: {kind}, {router}</td>" + "".join(
            f"<td>{_cell(cell, 3)}</td>" for cell in cells
        )
        body += "</tr>"
    meanings = "; ".join(
        f"<b>{escape(label)}</b>: {escape(what)}"
        for _, label, what in columns
        if what != "the same"
    )
    return f"<table class=layers><tr>{head}</tr>{body}</table><p>{meanings}.</p>"


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def groups_section(records: Records) -> str:
    """Returns the table of update sizes and norms by group at the last collected step."""
    sampled = [record for record in records if record.get("groups")]
    if not sampled:
        return ""
    numbers, step = sampled[-1]["groups"], sampled[-1]["step"]
    rows = "".join(
        f"<tr><td>{escape(group.replace('_', ' '))}</td><td>{_cell(update, 3)}</td>"
        f"<td>{_cell(numbers['weight_norm'][group], 4)}</td></tr>"
        for group, update in numbers["update_rms"].items()
    )
    head = "<tr><th>parameters</th><th>update RMS</th><th>weight norm</th></tr>"
    return _figure(f"Update sizes in step {step:,}", f"<table class=layers>{head}{rows}</table>")


def _figure(title: str, body: str) -> str:
    return f"<div class=charts><figure class=wide><h2>{escape(title)}</h2>{body}</figure></div>"
