"""The base of all sections of a config. Imports no torch."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change.

    The sections of `data`, `model` and `optim`, which import nothing from here, are as strict.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
