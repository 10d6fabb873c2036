"""Reports in self-contained HTML: of a run, a sweep, and the training data.

Names load on first use: matplotlib takes long to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.report.data import write_data_report
    from trainer.report.run import write_report
    from trainer.report.sweep import write_sweep_report

_MODULES = {
    "write_data_report": "trainer.report.data",
    "write_report": "trainer.report.run",
    "write_sweep_report": "trainer.report.sweep",
}
__all__ = ["write_data_report", "write_report", "write_sweep_report"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'trainer.report' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
