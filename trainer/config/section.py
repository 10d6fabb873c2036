"""The base of all sections of a config. Imports no torch."""

import os
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from data.storage import is_url


def _in_home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


def _no_url(value: Any) -> Any:
    if isinstance(value, str) and is_url(value):
        raise ValueError(
            "should be a folder on a file system, where files can grow; checkpoint.folder may be a "
            "URL (docs/storage.md)"
        )
    return value


UserPath = Annotated[Path, BeforeValidator(_no_url), AfterValidator(_in_home)]
"""A path, in which a `~` in front is the user's home; no URL."""


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change.

    The sections of `data`, `model` and `optim`, which import nothing from here, are as strict.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the first section inside an annotation such as `tuple[SourceConfig, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (section := section_in(inner)) is not None:
            return section
    return None
