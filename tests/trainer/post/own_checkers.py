"""Checkers of the tests, as a user's own."""

from __future__ import annotations

from trainer.post.checkers import Response


def count_a(response: Response) -> float:
    return response.text.count("a") / max(len(response.text), 1)


def constant(response: Response) -> float:
    return 0.5


def raises_on_a(response: Response) -> float:
    if "a" in response.text:
        raise ValueError("no a is allowed")
    return 1.0
