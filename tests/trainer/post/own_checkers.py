"""Checkers of the tests, as a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def count_a(record: Mapping[str, Any], text: str) -> float:
    return text.count("a") / max(len(text), 1)


def constant(record: Mapping[str, Any], text: str) -> float:
    return 0.5


def raises_on_a(record: Mapping[str, Any], text: str) -> float:
    if "a" in text:
        raise ValueError("no a is allowed")
    return 1.0
