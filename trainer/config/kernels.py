"""The `kernels` of a config: which implementation each operation should use. Imports no torch."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator

from model.kernels.operations import IMPLEMENTATIONS, OPERATIONS

AUTO = "auto"
_OF_ALL = (AUTO, "eager", "compile", "triton")
"""Values for all operations at once."""


def _check(setting: Any) -> Any:
    """Raises ValueError for an operation or an implementation that there is not."""
    if setting in _OF_ALL:
        return setting
    if not isinstance(setting, dict):
        raise ValueError(
            f"{setting!r} should be {_either(_OF_ALL)}, or a section with one of them for each "
            f"operation{_nearest(setting, _OF_ALL)}"
        )
    for operation, name in setting.items():
        if operation not in OPERATIONS:
            nearest = _nearest(operation, OPERATIONS)
            raise ValueError(
                f"there is no operation {operation!r}"
                + (nearest or f"; the operations are {', '.join(OPERATIONS)}")
            )
        names = (AUTO, *IMPLEMENTATIONS[operation])
        if name not in names:
            raise ValueError(
                f"{operation} = {name!r} should be {_either(names)}{_nearest(name, names)}"
            )
    return setting


KernelSetting = Annotated[str | dict[str, str], BeforeValidator(_check)]


def setting_of(setting: str | dict[str, str], operation: str) -> str:
    """Returns "auto" or the implementation that `kernels` asks for.

    "compile" for all operations is "eager" for those that have no compiled version.
    """
    if isinstance(setting, dict):
        return setting.get(operation, AUTO)
    if setting == "compile" and "compile" not in IMPLEMENTATIONS[operation]:
        return "eager"
    return setting


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _nearest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
