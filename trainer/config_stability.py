"""How a run is kept stable: anticipatory routing and spikes. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NaturalInt = Annotated[int, Field(ge=0)]


class AnticipationConfig(BaseModel):
    """Experts chosen with the weights of some steps ago (REP 4.2.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    when: Literal["never", "always"] = "never"
    """`always` from the first step to the last; REP has it on for a while after a spike."""
    lead: NaturalInt = 3
    """By how many steps; unpublished (L). What it costs does not depend on it, but for the memory
    of the choices that wait. 0 chooses with the present weights, as plain training does."""


class StabilityConfig(BaseModel):
    """See docs/stability.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    anticipation: AnticipationConfig = AnticipationConfig()


def problems(config: Any) -> Iterator[str]:
    """What contradicts the rest of the config, a sentence each that names both fields."""
    return iter(())
