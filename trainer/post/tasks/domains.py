"""The three domains: sums with carries, small functions, and tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from data.text.messages import Effort


@dataclass(frozen=True)
class Task:
    """A question and what its checker needs to know.

    Attributes:
        messages: the conversation, which ends in the user's turn.
        fields: the other fields of the prompt's line.
        content, calls: a right answer.
        reasoning: what leads to it, at the efforts that think; more at `max`.
    """

    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: dict[Effort, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for equal questions."""
        return json.dumps(self.messages, sort_keys=True)

    def answered(self, effort: Effort) -> dict[str, Any]:
        """Returns the conversation with its answer, as a record of training data."""
        answer = {"role": "assistant", "content": self.content, "tool_calls": self.calls}
        if effort in self.reasoning:
            answer["reasoning_content"] = self.reasoning[effort]
        return {"messages": [*self.messages, answer], "reasoning_effort": effort}


@dataclass(frozen=True)
class Domain:
    """Tasks of a kind, and the checker of their answers."""

    checker: str
    draw: Callable[[Random], Task]


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def draw_sum(random: Random) -> Task:
    """Draws a sum of two numbers of two or three digits, at least one of which is carried."""
    while True:
        first, second = (random.randrange(10, 1000) for _ in range(2))
        steps, carries = _column_steps(first, second)
        if carries:
            break
    total = str(first + second)
    brief = " ".join(f"{a}+{b}+{c}={a + b + c}" if c else f"{a}+{b}={a + b}" for a, b, c in steps)
    long = " ".join(
        f"{a} and {b} and carried {c} make {a + b + c}: write {(a + b + c) % 10}, carry "
        f"{(a + b + c) // 10}."
        for a, b, c in steps
    )
    return Task(
        _user(f"{first} + {second} = ?"),
        {"expected": total},
        content=total,
        reasoning={"high": brief, "max": f"{long} So it is {total}."},
    )


def _column_steps(first: int, second: int) -> tuple[list[tuple[int, int, int]], int]:
    """Returns (digit, digit, carried) from the last column on, and how often is carried."""
    steps, carry, carries = [], 0, 0
    while first or second:
        a, b = first % 10, second % 10
        steps.append((a, b, carry))
        carry = (a + b + carry) // 10
        carries += carry
        first, second = first // 10, second // 10
    return steps, carries


_OPERATIONS: list[tuple[str, str, Callable[[int, int], int]]] = [
    ("add {n}", "{x} + {n}", lambda x, n: x + n),
    ("subtract {n}", "{x} - {n}", lambda x, n: x - n),
    ("multiply by {n}", "{x} * {n}", lambda x, n: x * n),
    ("take the remainder by {n}", "{x} % {n}", lambda x, n: x % n),
    ("divide by {n} and round down", "{x} // {n}", lambda x, n: x // n),
]
_ARGUMENTS = (0, 3, 11, 40)


def draw_function(random: Random) -> Task:
    """Draws a function of one number, two operations one after the other."""
    name = random.choice("fgh")
    expression, words, results = "x", [], list(_ARGUMENTS)
    for text, code, operation in random.sample(_OPERATIONS, 2):
        number = random.randrange(2, 20)
        words.append(text.format(n=number))
        inner = expression if expression == "x" else f"({expression})"
        expression = code.format(x=inner, n=number)
        results = [operation(x, number) for x in results]
    pairs = list(zip(_ARGUMENTS, results, strict=True))
    tried = " ".join(f"At {x} it is {result}." for x, result in pairs[:2])
    return Task(
        _user(f"Write a Python function {name}(x): {words[0]}, then {words[1]}."),
        {"cases": [{"call": name, "arguments": [x], "result": result} for x, result in pairs]},
        content=f"```python\ndef {name}(x):\n    return {expression}\n```",
        reasoning={
            "high": expression,
            "max": f"First {words[0]}, then {words[1]}: {expression}. {tried}",
        },
    )


_CITIES = ("Ulm", "Lagos", "Lima", "Oslo", "Quito", "Pune", "Perth", "Turin", "Osaka", "Leeds")
_ROOMS = ("kitchen", "hall", "attic", "cellar", "garage", "bathroom", "bedroom", "office")
_EVENTS = ("tea", "bread", "laundry", "call", "walk", "rice", "nap", "meeting")


def _tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


_TOOLS = {
    "weather": _tool("weather", city="string", days="integer"),
    "light": _tool("light", room="string", percent="integer"),
    "timer": _tool("timer", label="string", minutes="integer"),
}


def draw_call(random: Random) -> Task:
    """Draws a request for one call of one of two tools, each with a text and a number."""
    name, other = random.sample(sorted(_TOOLS), 2)
    number = random.randrange(2, 100)
    text = random.choice({"weather": _CITIES, "light": _ROOMS, "timer": _EVENTS}[name])
    request = {
        "weather": f"What will the weather in {text} be for {number} days?",
        "light": f"Set the light in the {text} to {number} percent.",
        "timer": f"Remind me of the {text} in {number} minutes.",
    }[name]
    keys = list(_TOOLS[name]["parameters"]["properties"])
    call = {"name": name, "arguments": dict(zip(keys, (text, number), strict=True))}
    tools = [_TOOLS[key] for key in sorted((name, other))]
    return Task(
        [{"role": "system", "content": "", "tools": tools}, *_user(request)],
        {"calls": [call]},
        calls=[call],
        reasoning={
            "high": f"{name}: {text}, {number}",
            "max": f"It is {name}, not {other}. The {keys[0]} is {text}, {keys[1]} is {number}.",
        },
    )


DOMAINS = {
    "arithmetic": Domain("exact_answer", draw_sum),
    "functions": Domain("unit_tests", draw_function),
    "tools": Domain("tool_calls", draw_call),
}
"""The domains by name."""
