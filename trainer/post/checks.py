"""What the checkers of the domains give to answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trainer.config import ConfigError
from trainer.config.post import PostConfig

Checker = Callable[[Mapping[str, Any], str], float]
"""(the prompt's object in its file, the answer as text) -> score."""


@dataclass(frozen=True)
class Check:
    """The score of an answer, 0 where the checker has a problem with it."""

    score: float
    problem: str | None = None


class Checkers:
    """The checker of each domain. Raises ConfigError for one that cannot be imported."""

    def __init__(self, post: PostConfig) -> None:
        self._checkers = [
            None if domain.checker is None else _import(domain.checker, f"post.domains.{number}")
            for number, domain in enumerate(post.domains)
        ]

    def check(self, domain: int, record: Mapping[str, Any], text: str) -> Check:
        """Returns what the domain's checker gives an answer, 0 where it has none.

        An exception, and a result that is no finite number, is a problem and ends nothing.
        """
        checker = self._checkers[domain]
        if checker is None:
            return Check(0.0)
        try:
            score = float(checker(record, text))
        except Exception as error:
            return Check(0.0, f"{type(error).__name__}: {error}")
        if not math.isfinite(score):
            return Check(0.0, f"the score is {score}")
        return Check(score)


def _import(name: str, key: str) -> Checker:
    module, _, function = name.partition(":")
    try:
        checker = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}.checker = {name}: {error}; it should be a function, package.module:name"
        ) from None
    if not callable(checker):
        raise ConfigError(f"{key}.checker = {name}: is no function")
    return checker
