"""The report's section on the continued prompts of `evaluation.prompts`, over the run."""

from collections.abc import Sequence
from html import escape
from typing import Any, TypeVar

Item = TypeVar("Item")
MAX_STEPS = 8
"""Evaluations that are shown of each prompt: the last one, and others evenly before it."""


def samples_section(records: list[dict[str, Any]]) -> str:
    """Returns a table for each prompt: what the model made of it at which step."""
    sampled = [record for record in records if record.get("samples")]
    if not sampled:
        return ""
    prompts = dict.fromkeys(prompt for record in sampled for prompt in record["samples"])
    return "".join(_table(prompt, sampled) for prompt in prompts)


def shown_steps(found: Sequence[Item]) -> list[Item]:
    """Returns at most MAX_STEPS of the evaluations: the last one, and others evenly before it."""
    count = min(len(found), MAX_STEPS)
    return [found[len(found) - 1 - (len(found) * n) // count] for n in reversed(range(count))]


def _table(prompt: str, sampled: list[dict[str, Any]]) -> str:
    found = [(r["step"], r["samples"][prompt]) for r in sampled if prompt in r["samples"]]
    rows = "".join(
        f"<tr><td>step {step:,}</td><td class=sample>{escape(text)}</td></tr>"
        for step, text in shown_steps(found)
    )
    title = f"<h2>Continuations of <code>{escape(prompt)}</code></h2>"
    return f"<figure class=wide>{title}<table>{rows}</table></figure>"
