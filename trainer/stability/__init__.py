"""Loss spikes: their detection, rollbacks, and anticipatory routing (report §4.2.3).

Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.stability.anticipation import Anticipation
    from trainer.stability.rollback import Stability
    from trainer.stability.spikes import SpikeDetector, severity

_MODULES = {
    "Anticipation": "anticipation",
    "SpikeDetector": "spikes",
    "Stability": "rollback",
    "severity": "spikes",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
