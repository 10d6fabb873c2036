"""The report's section on the ranks: how long each works in a step, and which is slow."""

import statistics
from collections import Counter
from html import escape
from typing import Any

from trainer.report.plots import heat_map


def ranks_section(records: list[dict[str, Any]]) -> str:
    """Returns the section; empty for a run of one process, or where the records lack it.

    A run that changed the number of its processes shows the last number.
    """
    sampled = [record for record in records if record.get("work_seconds")]
    if not sampled:
        return ""
    ranks = len(sampled[-1]["work_seconds"])
    sampled = [record for record in sampled if len(record["work_seconds"]) == ranks]
    slowest = Counter((record["slowest"]["rank"], record["slowest"]["host"]) for record in sampled)
    (rank, host), times = slowest.most_common(1)[0]
    excess = statistics.median(
        record["slowest"]["excess"] for record in sampled if record["slowest"]["rank"] == rank
    )
    columns = [(record["step"], record["work_seconds"]) for record in sampled]
    title = "Work of each rank"
    return (
        f"<div class=charts><figure class=wide><h2>{title}</h2>"
        f"{heat_map(columns, title, 'rank', 'seconds per step')}<p>Seconds of a step in which a "
        "rank works and does not wait for others in a collective. The slowest was most often rank "
        f"{rank} on {escape(host)}: in {times / len(sampled):.0%} of the points, then by "
        f"{excess:.0%} (median) beyond the others with the same work.</p></figure></div>"
    )
