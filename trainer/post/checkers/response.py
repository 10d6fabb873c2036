"""An answer as checkers see it, and what they say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field, JsonValue

from data.text.messages import Call, Checked, Effort


class Response(Checked):
    """One answer to a prompt.

    Attributes:
        text: all of it but eos, special tokens as they are spelled.
        answer: what remains without reasoning, tool calls and special tokens.
        reasoning: what it thought first; None without thinking.
        calls: its tool calls.
        problem: where it leaves the released form, such as thinking or a call without an end, or
            its limit of tokens; "" where it does not.
        effort: the mode of thinking that was asked for.
        tokens: its length, everything included.
        fields: the prompt's object in its file, such as `expected` in it.
    """

    text: str = ""
    answer: str = ""
    reasoning: str | None = None
    calls: list[Call] = Field(default_factory=list)
    problem: str = ""
    effort: Effort = "none"
    tokens: int = 0
    fields: dict[str, JsonValue] = Field(default_factory=dict)


Checker = Callable[[Response], float]
"""Returns the reward of an answer, from 0 to 1."""


@dataclass(frozen=True)
class Score:
    """A reward.

    Attributes:
        reward: from 0 to 1; 0 where the checker failed.
        failure: what the checker did wrong, in a sentence; "" where it worked.
        kind: `raised`, `hung`, `died` or `value`, the kind of failure; "" where it worked.
    """

    reward: float
    failure: str = ""
    kind: str = ""
