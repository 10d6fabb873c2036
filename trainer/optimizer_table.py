"""The optimizer's table of a run's parameters. Imports no torch."""

from collections.abc import Mapping
from dataclasses import replace

from model.parameter_spec import Shape
from model.parameters import parameter_table
from optim import Assignment, build_table
from trainer.config import RunConfig


def table_of_run(config: RunConfig, shapes: Mapping[str, Shape]) -> list[Assignment]:
    """Returns the assignments of parameters with these shapes.

    Without phases the indexers have no gradient but zeros, and no weight decay either, which would
    shrink them though they learn nothing: they keep their initial values.
    """
    table = build_table(shapes, parameter_table(config.model), config.optim)
    if config.phases:
        return table
    return [
        replace(entry, weight_decay=0.0) if ".indexer." in entry.name else entry for entry in table
    ]
