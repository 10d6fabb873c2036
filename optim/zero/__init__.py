"""Hybrid ZeRO: Muon and AdamW with states divided over ranks (report §3).

`hybrid_zero` has the phases of a step, `plan` divides the updates over ranks. Names are loaded on
first use, so that the plan can be used without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from optim.zero.group import ParameterGroup, Pending, Precision, RankGroup, StateSlice
    from optim.zero.hybrid_zero import CHUNK_ELEMENTS, HybridZero
    from optim.zero.loads import Load, LoadSummary, loads_of, page_locked_bytes
    from optim.zero.plan import Layout, LocalParameter, newton_schulz_flops, plan_owners

_MODULES = {
    "CHUNK_ELEMENTS": "hybrid_zero",
    "HybridZero": "hybrid_zero",
    "Layout": "plan",
    "Load": "loads",
    "LoadSummary": "loads",
    "LocalParameter": "plan",
    "ParameterGroup": "group",
    "Precision": "group",
    "RankGroup": "group",
    "StateSlice": "group",
    "Pending": "group",
    "loads_of": "loads",
    "newton_schulz_flops": "plan",
    "page_locked_bytes": "loads",
    "plan_owners": "plan",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
