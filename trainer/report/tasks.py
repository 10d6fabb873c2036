"""The report's section on the scores of `evaluation.tasks`, over the run."""

from html import escape
from typing import Any

from trainer.report.samples import shown_steps


def tasks_section(records: list[dict[str, Any]]) -> str:
    """Returns a table: a row for each task and metric, a column for each step that is shown."""
    scored = [(record["step"], record["tasks"]) for record in records if record.get("tasks")]
    if not scored:
        return ""
    columns = shown_steps(scored)
    names = dict.fromkeys(name for _, scores in columns for name in scores)
    head = "".join(f"<th>step {step:,}</th>" for step, _ in columns)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{_cell(scores, name)}</td>" for _, scores in columns)
        + "</tr>"
        for name in names
        if not name.endswith("_stderr")
    )
    table = f"<table class=layers><tr><th>task/metric</th>{head}</tr>{rows}</table>"
    return f"<figure class=wide><h2>Scores in tasks of lm-eval</h2>{table}</figure>"


def _cell(scores: dict[str, float | None], name: str) -> str:
    value, error = scores.get(name), scores.get(f"{name}_stderr")
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
