"""The key-value cache of a model, and cached steps with the modules of training.

`model.cache.sizes` counts its bytes without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.cache.cache import Cache
    from model.cache.step import CachedModel

__all__ = ["Cache", "CachedModel"]
_MODULES = {"Cache": "cache", "CachedModel": "step"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
