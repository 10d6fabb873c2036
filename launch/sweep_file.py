"""Reads a sweep in wandb's format and makes the command of each trial."""

import itertools
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from launch.sweep_parameters import Parameter
from trainer.config import ConfigError, Section, load_as, load_config

Arguments = dict[str, Any]


class Metric(Section):
    """The value of `metrics.jsonl` that the sweep optimises."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"


class Hyperband(Section):
    """wandb's early stopping; iterations count the points of the metric, from 0."""

    type: Literal["hyperband"]
    min_iter: PositiveInt | None = None
    max_iter: PositiveInt | None = None
    s: PositiveInt | None = None
    eta: Annotated[float, Field(gt=1)] = 3

    @model_validator(mode="after")
    def _has_brackets(self) -> "Hyperband":
        if (self.min_iter is None) == (self.max_iter is None):
            raise ValueError("hyperband needs either min_iter or max_iter")
        if (self.max_iter is None) != (self.s is None):
            raise ValueError("max_iter and s belong together")
        if self.max_iter is not None and self.max_iter < self.eta:
            raise ValueError(f"max_iter = {self.max_iter} should be at least eta = {self.eta:g}")
        return self


class Sweep(Section):
    """A sweep file, as `wandb sweep` takes it.

    All fields have wandb's names; the keys inside `parameters` are fields of the run's config.
    """

    program: str
    command: tuple[str, ...] = ("${env}", "${interpreter}", "${program}", "${args}")
    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: dict[str, Parameter]
    early_terminate: Hyperband | None = None
    run_cap: PositiveInt | None = None
    name: str | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None

    @model_validator(mode="after")
    def _can_search(self) -> "Sweep":
        if not self.parameters:
            raise ValueError("parameters should name at least one field")
        for name, parameter in self.flat().items():
            if self.method == "grid" and parameter.choices is None:
                raise ValueError(f"parameters.{name}: a grid needs values, not a range")
        if self.method != "grid" and self.run_cap is None:
            raise ValueError(f"method {self.method} has no end of its own; set run_cap")
        if "${args_no_hyphens}" not in self.command:
            raise ValueError("command should hold ${args_no_hyphens}: overrides read key=value")
        return self

    def flat(self) -> dict[str, Parameter]:
        """Returns every searched parameter under its dotted name."""
        return dict(_flatten(self.parameters, ""))

    @property
    def trials(self) -> int:
        """Number of trials of the whole sweep."""
        if self.method == "grid":
            size = 1
            for parameter in self.flat().values():
                size *= len(parameter.choices or ())
            return min(size, self.run_cap or size)
        return self.run_cap or 0

    def points(self) -> Iterator[Arguments]:
        """Yields all points of a grid; the last parameter changes fastest."""
        flat = self.flat()
        for values in itertools.product(*(flat[name].choices or () for name in flat)):
            yield dict(zip(flat, values, strict=True))

    def samples(self) -> Iterator[Arguments]:
        """Yields points whose configs are checked: the grid, or both ends of each range in turn."""
        if self.method == "grid":
            yield from itertools.islice(self.points(), self.trials)
            return
        ends = {name: parameter.ends() for name, parameter in self.flat().items()}
        first = {name: values[0] for name, values in ends.items()}
        for name, values in ends.items():
            for value in values:
                yield {**first, name: value}

    def trial_command(self, arguments: Mapping[str, Any]) -> list[str]:
        """Returns the command that `wandb agent` runs, with this interpreter."""
        pairs = [f"{name}={value}" for name, value in arguments.items()]
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args_no_hyphens}": pairs,
        }
        argv = [argument for part in self.command for argument in macros.get(part, [part])]
        unknown = [argument for argument in argv if argument.startswith("${")]
        if unknown:
            raise ConfigError(f"command: {unknown[0]} is not among {', '.join(macros)}")
        return argv

    def config_arguments(self, arguments: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Returns config file and overrides of a trial's command, which sets its own `run_dir`."""
        argv = self.trial_command(arguments)
        for i, argument in enumerate(argv):
            if argument.endswith((".yaml", ".yml")):
                return argument, argv[i + 1 :]
        raise ConfigError("command: has no config file (.yaml)")


def _flatten(parameters: Mapping[str, Parameter], above: str) -> Iterator[tuple[str, Parameter]]:
    for name, parameter in parameters.items():
        if parameter.parameters is None:
            yield above + name, parameter
        else:
            yield from _flatten(parameter.parameters, f"{above}{name}.")


def load_sweep(path: str | Path) -> Sweep:
    """Reads a sweep file and loads the configs of its trials.

    Raises ConfigError: one sentence, also for a parameter that is no field of the config.
    """
    sweep = load_as(Sweep, path)
    program = sweep.trial_command({})[0]
    if shutil.which(program) is None:
        raise ConfigError(f"{path}: command: {program!r} is not a program on this machine")
    for arguments in sweep.samples():
        try:
            load_config(*sweep.config_arguments(arguments))
        except ConfigError as error:
            message = str(error).replace("command line", f"{path}: parameters", 1)
            raise ConfigError(message if str(path) in message else f"{path}: {message}") from None
    return sweep
