"""Rewards of answers: checkers, built-in ones and the user's, and the sandbox for code under test.

Imports no torch. `read_response` is loaded on first use: workers do without the tokenizer.
"""

from typing import TYPE_CHECKING, Any

from trainer.post.checkers.pool import CheckerPool
from trainer.post.checkers.response import Checker, Response, Score
from trainer.post.checkers.sandbox import Outcome, Program, Sandbox

if TYPE_CHECKING:
    from trainer.post.checkers.read import read_response

__all__ = [
    "Checker",
    "CheckerPool",
    "Outcome",
    "Program",
    "Response",
    "Sandbox",
    "Score",
    "read_response",
]


def __getattr__(name: str) -> Any:
    if name != "read_response":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.post.checkers.read import read_response

    return read_response
