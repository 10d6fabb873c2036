"""The DeepSeek-V4 model: plain PyTorch mathematics on local tensors.

Importing this package does not import torch; the first name that needs torch does.
"""

from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.errors import ModelConfigError

if TYPE_CHECKING:
    from model.layout import SampleLayout
    from model.targets import IGNORE_INDEX, TokenCounts
    from model.transformer import ModelOutput, V4Model

__all__ = [
    "IGNORE_INDEX",
    "ModelConfig",
    "ModelConfigError",
    "ModelOutput",
    "SampleLayout",
    "TokenCounts",
    "V4Model",
]

_MODULES = {
    "SampleLayout": "model.layout",
    "TokenCounts": "model.targets",
    "IGNORE_INDEX": "model.targets",
    "V4Model": "model.transformer",
    "ModelOutput": "model.transformer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
