"""The built-in checkers, by name: `checker: exact_answer` in a domain."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import partial
from math import isclose
from typing import Any

from trainer.post.checkers.response import Checker, Response
from trainer.post.checkers.sandbox import Program, Sandbox

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def exact_answer(response: Response) -> float:
    """Whether the answer is `expected`, or one of them where it is a list.

    Read are the last \\boxed{...}, or the last line without one. Numbers are equal by value, texts
    but for spaces. An answer that leaves the released form is wrong.
    """
    expected = response.fields["expected"]
    options = expected if isinstance(expected, list) else [expected]
    lines = [line for line in response.answer.splitlines() if line.strip()]
    boxed = _BOXED.findall(response.answer)
    given = boxed[-1] if boxed else lines[-1] if lines else ""
    return float(not response.problem and _plain(given) in [_plain(str(item)) for item in options])


def _plain(text: str) -> str | Decimal:
    """A number, or a text with single spaces."""
    try:
        number = Decimal(text.strip().replace(",", ""))
        return number if number.is_finite() else " ".join(text.split())
    except InvalidOperation:
        return " ".join(text.split())


def unit_tests(sandbox: Sandbox, response: Response) -> float:
    """Whether the answer's code passes `tests`, source code, and `cases`.

    A case is {"call": name, "arguments": [...], "result": ...}, JSON values; with `partial` true,
    the reward is the share of cases that are right. Read is the last block of code, or the whole
    answer without one.
    """
    tests, cases = response.fields.get("tests", ""), response.fields.get("cases", [])
    if not isinstance(tests, str) or not isinstance(cases, list) or not (tests or cases):
        raise ValueError("a prompt for unit_tests has `tests`, a text, or `cases`, a list, or both")
    wanted: list[dict[str, Any]] = [dict(case) for case in cases if isinstance(case, dict)]
    blocks = _CODE.findall(response.answer)
    calls = [(case["call"], case["arguments"]) for case in wanted]
    outcome = sandbox.run(Program(blocks[-1] if blocks else response.answer, tests, calls))
    if outcome.status != "finished" or len(outcome.values) != len(wanted):
        return 0.0
    right = sum(
        isinstance(value, dict) and "value" in value and same(value["value"], case["result"])
        for value, case in zip(outcome.values, wanted, strict=True)
    )
    if response.fields.get("partial") and wanted:
        return right / len(wanted)
    return float(right == len(wanted))


def same(first: Any, second: Any) -> bool:
    """Whether JSON values are equal; floats up to rounding, and true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, float) or isinstance(second, float):
        numbers = isinstance(first, int | float) and isinstance(second, int | float)
        return numbers and isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return bool(first == second)


def tool_calls(response: Response) -> float:
    """Whether the answer's tool calls are `calls`: names and arguments, in order."""
    wanted = response.fields["calls"]
    given = [{"name": call.name, "arguments": call.arguments} for call in response.calls]
    return float(not response.problem and same(given, wanted))


def released_form(response: Response) -> float:
    """Whether the answer keeps the released form: an end, and reasoning where it was asked for."""
    thinks = bool((response.reasoning or "").strip())
    return float(not response.problem and thinks == (response.effort != "none"))


def length(response: Response) -> float:
    """Whether the answer has from `min_tokens` (by default 0) to `max_tokens` tokens."""
    low, high = response.fields.get("min_tokens", 0), response.fields["max_tokens"]
    if not isinstance(low, int) or not isinstance(high, int):
        raise ValueError("a prompt for length has `max_tokens`, and may have `min_tokens`, numbers")
    return float(low <= response.tokens <= high)


def built_in(sandbox: Sandbox) -> dict[str, Checker]:
    """Returns the built-in checkers by name."""
    checkers: list[Callable[[Response], float]] = [exact_answer, tool_calls, released_form, length]
    return {checker.__name__: checker for checker in checkers} | {
        "unit_tests": partial(unit_tests, sandbox)
    }
