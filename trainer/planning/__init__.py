"""What a run needs before it starts: memory, traffic, the time of a layer, the settings that fit.

Names are loaded on first use: some modules import torch, and tables take rich.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.planning.dry_run import count_memory
    from trainer.planning.efficiency_report import describe_efficiency
    from trainer.planning.expected_memory import (
        expected_memory_report,
        host_memory_warning,
        rough_activations,
    )
    from trainer.planning.fit_device import fit_to_device
    from trainer.planning.layer_times import measure_layers
    from trainer.planning.out_of_memory import advise_on_out_of_memory
    from trainer.planning.plan import describe_plan
    from trainer.planning.static_memory import (
        checkpoint_copy_memory,
        memory_parts,
        snapshot_memory,
    )
    from trainer.planning.traffic import Work, step_traffic

_MODULES = {
    "Work": "traffic",
    "advise_on_out_of_memory": "out_of_memory",
    "checkpoint_copy_memory": "static_memory",
    "count_memory": "dry_run",
    "describe_efficiency": "efficiency_report",
    "describe_plan": "plan",
    "expected_memory_report": "expected_memory",
    "fit_to_device": "fit_device",
    "host_memory_warning": "expected_memory",
    "measure_layers": "layer_times",
    "memory_parts": "static_memory",
    "rough_activations": "expected_memory",
    "snapshot_memory": "static_memory",
    "step_traffic": "traffic",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
