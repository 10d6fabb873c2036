"""Muon and AdamW, the table that divides the parameters between them, schedules and clipping.

The names load on first use, so that `optim.config` can be imported without torch. Two functions
bear the name of their file and are imported from it: `optim.schedule.schedule` and
`optim.newton_schulz.newton_schulz`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optim.clip import clip_, gradient_norm
    from optim.config import AdamWConfig, MuonConfig, OptimConfig, ScheduleConfig
    from optim.errors import OptimError
    from optim.optimizer import Optimizer
    from optim.partition import Assignment, ParameterFacts, build_table, render_table
    from optim.schedule import in_decay
    from optim.zero.group import StatePiece
    from optim.zero.hybrid_zero import HybridZero

__all__ = [
    "AdamWConfig",
    "Assignment",
    "HybridZero",
    "MuonConfig",
    "OptimConfig",
    "OptimError",
    "Optimizer",
    "ParameterFacts",
    "ScheduleConfig",
    "StatePiece",
    "build_table",
    "clip_",
    "gradient_norm",
    "in_decay",
    "render_table",
]

_HOME = {
    "clip_": "clip",
    "gradient_norm": "clip",
    "AdamWConfig": "config",
    "MuonConfig": "config",
    "OptimConfig": "config",
    "ScheduleConfig": "config",
    "OptimError": "errors",
    "HybridZero": "zero.hybrid_zero",
    "Optimizer": "optimizer",
    "Assignment": "partition",
    "ParameterFacts": "partition",
    "build_table": "partition",
    "render_table": "partition",
    "in_decay": "schedule",
    "StatePiece": "zero.group",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optim' has no attribute '{name}'")
    return getattr(import_module(f"optim.{_HOME[name]}"), name)
