"""A record of metrics as monitoring services want it: one value for every name."""

import statistics
from typing import Any

from trainer.metrics.layer_stats import flatten_layers
from trainer.metrics.update_stats import flatten_groups


def flatten(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a flat record; of the ranks' work it has the median, the longest and the slowest."""
    plain = {n: v for n, v in record.items() if not isinstance(v, dict | list) and v is not None}
    losses = record.get("validation_by_source", {})
    plain |= {f"validation_loss/{name}": loss for name, loss in losses.items()}
    bits = record.get("validation_bits_per_byte_by_source", {})
    plain |= {f"validation_bits_per_byte/{name}": value for name, value in bits.items()}
    plain |= {f"tasks/{name}": score for name, score in record.get("tasks", {}).items()}
    plain |= {f"post/{name}": value for name, value in record.get("post", {}).items()}
    plain |= {f"epochs/{name}": read for name, read in record.get("epochs", {}).items()}
    if work := record.get("work_seconds"):
        plain |= {"work_seconds/median": statistics.median(work), "work_seconds/max": max(work)}
    plain |= {f"slowest/{name}": value for name, value in record.get("slowest", {}).items()}
    return (
        plain | flatten_layers(record.get("layers", {})) | flatten_groups(record.get("groups", {}))
    )
