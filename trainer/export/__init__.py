"""To and from Hugging Face folders: export, import, packed weights, a sample of text.

Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.export.check import check_command
    from trainer.export.export import export_run, read_run_weights
    from trainer.export.hf_folder import read_hf_config, read_hf_weights, read_object
    from trainer.export.import_run import import_hf_folder, imported_sizes, open_run
    from trainer.export.sample import sample_text
    from trainer.export.trained_with import read_trained_with

_MODULES = {
    "check_command": "check",
    "export_run": "export",
    "import_hf_folder": "import_run",
    "imported_sizes": "import_run",
    "open_run": "import_run",
    "read_hf_config": "hf_folder",
    "read_hf_weights": "hf_folder",
    "read_object": "hf_folder",
    "read_run_weights": "export",
    "read_trained_with": "trained_with",
    "sample_text": "sample",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
