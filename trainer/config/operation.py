"""Settings of what observes a run: the watchdog and profiles. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from trainer.config.section import Section


class WatchdogConfig(Section):
    """Ends a run in which a rank makes no progress, and reports which rank the others wait for
    (docs/operations.md)."""

    seconds: Annotated[float, Field(ge=0, le=1e7)] | None = None
    """How long the computation of a step or of an evaluation's batch may go on without a sign of
    progress; null is 10 times the median of the last steps, at least 60; 0 turns the watchdog off.
    [seconds]"""
    slow_seconds: Annotated[float, Field(gt=0, le=1e7)] = 1800.0
    """The same for what may take long: loading, building the model, the first three steps of a
    start or of a phase (which may compile), and files: reading data, metrics, saving. [seconds]"""


class ProfileConfig(Section):
    """Profiles by torch.profiler, in `profiles` of the run folder (docs/operations.md)."""

    steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step to be profiled, as the log counts them; null: none. [steps]"""
    steps_on_signal: PositiveInt = 3
    """Number of steps that are profiled after SIGUSR1. [steps]"""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write a profile."""


def profile_problems(profile: ProfileConfig, steps: int) -> Iterator[str]:
    """Yields what is wrong with the profile of a run of this many steps.

    - `profile.steps` are in order, and at most `steps`.
    """
    if profile.steps is None:
        return
    first, last = profile.steps
    if first > last:
        yield f"profile.steps = [{first}, {last}] should have the first step before the last"
    if last > steps:
        yield (
            f"profile.steps = [{first}, {last}] should be at most {steps}, the last step of the run"
        )
