"""The base of the models of configs, and their paths."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from data.storage import check_url

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which a `~` in front is the user's home."""
PlaceText = Annotated[str, AfterValidator(check_url)]
"""A path, or the URL of a folder in object storage."""


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
