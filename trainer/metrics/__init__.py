"""Metrics of a run: metrics.jsonl, wandb, the progress line, stats of layers and updates.

Names are loaded on first use, so that metrics.jsonl is read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.metrics.jsonl import Event, Record, finite, read_events, read_metrics
    from trainer.metrics.layer_hooks import collect_stats
    from trainer.metrics.layer_stats import compute_layer_stats
    from trainer.metrics.metrics import Metrics, describe_event
    from trainer.metrics.tensorboard_log import tensorboard_is_installed
    from trainer.metrics.update_stats import UpdateStats

_MODULES = {
    "Event": "jsonl",
    "Metrics": "metrics",
    "Record": "jsonl",
    "UpdateStats": "update_stats",
    "collect_stats": "layer_hooks",
    "compute_layer_stats": "layer_stats",
    "describe_event": "metrics",
    "finite": "jsonl",
    "read_events": "jsonl",
    "read_metrics": "jsonl",
    "tensorboard_is_installed": "tensorboard_log",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
