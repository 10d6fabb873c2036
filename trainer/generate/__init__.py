"""Generation: continues text with a trained model.

Names are loaded on first use; all but the options import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.generate.generate import Generation, Request, Statistics
    from trainer.generate.load import OpenedModel, open_model
    from trainer.generate.sampling import Sampling

_MODULES = {
    "Generation": "generate",
    "OpenedModel": "load",
    "Request": "generate",
    "Sampling": "sampling",
    "Statistics": "generate",
    "open_model": "load",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
