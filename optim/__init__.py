"""Muon and AdamW, hybrid ZeRO over them, the assignment of parameters, the schedule and clipping.

Names are loaded on first use, so that `optim.config` can be imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from optim.clip import clip_, gradient_norm
    from optim.config import AdamWConfig, MuonConfig, OptimConfig, ScheduleConfig
    from optim.errors import OptimError
    from optim.optimizer import Optimizer, check_names
    from optim.partition import Assignment, ParameterFacts, build_table, render_table
    from optim.schedule import decay_start, learning_rate_at
    from optim.zero import HybridZero, StateSlice

_MODULES = {
    "AdamWConfig": "config",
    "Assignment": "partition",
    "HybridZero": "zero",
    "MuonConfig": "config",
    "OptimConfig": "config",
    "OptimError": "errors",
    "Optimizer": "optimizer",
    "ParameterFacts": "partition",
    "ScheduleConfig": "config",
    "StateSlice": "zero",
    "build_table": "partition",
    "check_names": "optimizer",
    "clip_": "clip",
    "decay_start": "schedule",
    "gradient_norm": "clip",
    "learning_rate_at": "schedule",
    "render_table": "partition",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
