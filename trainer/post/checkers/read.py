"""From the tokens of an answer to what checkers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from data import DataError, Tokenizer
from data.text import OWN_PROMPTS, Prompts, decode
from data.text.messages import Assistant, Effort
from trainer.post.checkers.response import Response

_END_THINK = "</think>"


def read_response(
    question: Sequence[int],
    answer: Sequence[int],
    tokenizer: Tokenizer,
    effort: Effort | None,
    fields: Mapping[str, JsonValue],
    prompts: Prompts = OWN_PROMPTS,
) -> Response:
    """Returns an answer in parts.

    Args:
        question: ids of the rendered conversation that asks for it, without bos.
        answer: the ids that were sampled, with eos where it has an end.
        effort: the mode of thinking of a conversation; None for a prompt of plain text, whose
            answer is one text.
        fields: the prompt's object in its file.
    """
    is_complete = bool(answer) and answer[-1] == tokenizer.eos_id
    problem = "" if is_complete else "it has no end"
    reasoning: list[int] = []
    end_think = tokenizer.special.get(_END_THINK)
    text = list(answer)
    if effort not in (None, "none"):
        if end_think in text:
            reasoning, text = text[: text.index(end_think)], text[text.index(end_think) + 1 :]
        else:
            reasoning, text, problem = text, [], "its reasoning has no end"
    parts: dict[str, object] = {"answer": _plain(text, tokenizer), "reasoning": None}
    if effort not in (None, "none"):
        parts["reasoning"] = _plain(reasoning, tokenizer)
    if effort is not None and not problem:
        try:
            message = decode([*question, *answer], tokenizer, prompts).messages[-1]
            assert isinstance(message, Assistant)
            parts |= {"answer": message.content, "calls": message.tool_calls}
        except DataError as error:
            problem = f"it leaves the released form: {error}"
    return Response.model_validate(
        {
            **parts,
            "text": tokenizer.decode(answer[:-1] if is_complete else answer),
            "problem": problem,
            "effort": effort or "none",
            "tokens": len(answer),
            "fields": dict(fields),
        }
    )


def _plain(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    special = set(tokenizer.special.values())
    return tokenizer.decode([i for i in ids if i not in special])
