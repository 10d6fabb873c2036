"""One parameter of a sweep: wandb's distributions as optuna suggests them."""

import json
import math
from statistics import NormalDist
from typing import Any, Literal

import optuna
from pydantic import Field, PositiveFloat, model_validator

from trainer.config import Section

Distribution = Literal[
    "constant",
    "categorical",
    "uniform",
    "int_uniform",
    "q_uniform",
    "log_uniform",
    "q_log_uniform",
    "inv_log_uniform",
    "log_uniform_values",
    "q_log_uniform_values",
    "inv_log_uniform_values",
    "normal",
    "q_normal",
    "log_normal",
    "q_log_normal",
]
_TAIL = 1e-6  # a normal distribution is cut where its tails have this probability


class Parameter(Section):
    """A parameter in wandb's format, with wandb's distributions."""

    value: Any = None
    values: tuple[Any, ...] | None = Field(None, min_length=1)
    distribution: Distribution | None = None
    min: float | int | None = None
    max: float | int | None = None
    mu: float = 0.0
    sigma: PositiveFloat = 1.0
    q: PositiveFloat = 1.0
    parameters: dict[str, "Parameter"] | None = None

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Parameter":
        kinds = [
            "value" in self.model_fields_set,
            self.values is not None,
            self.parameters is not None,
            self.min is not None or self.max is not None or "normal" in (self.distribution or ""),
        ]
        if sum(kinds) != 1:
            raise ValueError("a parameter has one of value, values, parameters, or min and max")
        expected = {"value": "constant", "values": "categorical"}
        for name, distribution in expected.items():
            if name in self.model_fields_set and self.distribution not in (None, distribution):
                raise ValueError(f"{name} goes with distribution {distribution}")
        if kinds[3]:
            self._check_range()
        return self

    def _check_range(self) -> None:
        if "normal" in self.kind:
            if self.min is not None or self.max is not None:
                raise ValueError(f"{self.kind} takes mu and sigma, not min and max")
            return
        if self.kind in ("constant", "categorical"):
            raise ValueError(f"{self.kind} takes value or values, not min and max")
        if self.min is None or self.max is None or not self.min < self.max:
            raise ValueError(f"min = {self.min} should be below max = {self.max}")
        if self.kind.endswith("_values") and self.min <= 0:
            raise ValueError(f"min = {self.min} should be above 0 for {self.kind}")
        if self.kind == "int_uniform" and not (
            self.min == int(self.min) and self.max == int(self.max)
        ):
            raise ValueError("int_uniform takes whole numbers for min and max")

    @property
    def kind(self) -> str:
        """The distribution; wandb's default if absent."""
        if self.distribution is not None:
            return self.distribution
        if self.values is not None:
            return "categorical"
        if self.min is None:
            return "constant"
        return (
            "int_uniform" if isinstance(self.min, int) and isinstance(self.max, int) else "uniform"
        )

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """All values if there are finitely many, else None."""
        if self.kind == "constant":
            return (self.value,)
        if self.kind == "categorical":
            return self.values
        if self.kind == "int_uniform" and self.min is not None and self.max is not None:
            return tuple(range(int(self.min), int(self.max) + 1))
        if self.kind == "q_uniform" and self.min is not None and self.max is not None:
            first, last = round(self.min / self.q), round(self.max / self.q)
            return tuple(_tidy(i * self.q) for i in range(first, last + 1))
        return None

    def ends(self) -> tuple[Any, ...]:
        """Returns values that show whether the config accepts this parameter: all, or both ends."""
        if self.kind in ("constant", "categorical"):
            return self.choices or ()
        low, high, _ = self._base()
        return self._shape(low), self._shape(high)

    def _base(self) -> tuple[float, float, bool]:
        """Returns the range that optuna searches, and whether on a log scale."""
        if "normal" in self.kind:
            return _TAIL, 1 - _TAIL, False
        assert self.min is not None and self.max is not None
        return self.min, self.max, self.kind.endswith("_values")

    def _shape(self, x: float) -> Any:
        """Returns the parameter's value for a point of the range that optuna searches."""
        kind = self.kind
        if "normal" in kind:
            x = NormalDist(self.mu, self.sigma).inv_cdf(x)
        if kind == "inv_log_uniform":
            x = math.exp(-x)
        elif "log" in kind and not kind.endswith("_values"):
            x = math.exp(x)
        if kind.startswith("q_"):
            return _tidy(round(x / self.q) * self.q)
        return int(x) if kind == "int_uniform" else x

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Returns this trial's value."""
        if self.kind in ("constant", "categorical"):
            return json.loads(
                trial.suggest_categorical(name, list(map(json.dumps, self.choices or ())))
            )
        low, high, log = self._base()
        if self.kind == "int_uniform":
            return trial.suggest_int(name, int(low), int(high))
        return self._shape(trial.suggest_float(name, low, high, log=log))


def _tidy(x: float) -> float | int:
    """Rounds off the last digits that a product of floats adds; whole numbers become int."""
    x = float(f"{x:.12g}")
    return int(x) if x == int(x) else x
