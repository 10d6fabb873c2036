"""The line about memory at the start of a run."""

from trainer.config import RunConfig
from trainer.formatting import gib
from trainer.planning.static_memory import memory_parts


def expected_memory_report(config: RunConfig, world_size: int) -> str:
    """Returns a line about the memory that the fullest process holds throughout the run.

    It is the closed form, which costs milliseconds and builds no model; activations, which
    `v4 plan --dry-run` counts, are not included. Raises ConfigError as `RunConfig.degrees`.
    """
    if config.engine != "native":
        return f"memory: no estimate before the run with engine = {config.engine}"
    parts = memory_parts(config, config.degrees(world_size))
    listing = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    return (
        f"memory: {gib(sum(parts.values()))} expected throughout the run on the fullest process: "
        f"{listing}; v4 plan --dry-run adds activations"
    )
