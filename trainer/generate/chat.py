"""`v4 chat`: a conversation with a model on the terminal, in the released written form.

Each turn is rendered and run whole: which reasoning stays in the text depends on later turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data import DataError, Tokenizer
from data.activity import Activity, print_line
from data.text import OWN_PROMPTS, Prompts, decode, encode, read_messages, read_prompts
from data.text.messages import Assistant, Call, Effort
from trainer.config import ConfigError
from trainer.generate.command import Decoder, line_ends, require_utf8, summary
from trainer.generate.generate import Generation, Request
from trainer.generate.load import OpenedModel, open_shared
from trainer.generate.sampling import Sampling

OPENING = "\n\n<"
"""What precedes the first special token of tool calls."""
DIM, PLAIN = "\033[2m", "\033[0m"


class Chat:
    """A conversation: its messages, and the settings of the model's answers.

    Attributes:
        messages: in the form that `read_messages` reads.
    """

    def __init__(
        self,
        opened: OpenedModel,
        effort: Effort,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
        prompts: Prompts = OWN_PROMPTS,
        system: str | None = None,
        tools: list[Any] | None = None,
    ) -> None:
        self._opened, self._effort, self._prompts = opened, effort, prompts
        self._sampling, self._max_new_tokens, self._seed = sampling, max_new_tokens, seed
        self.messages: list[dict[str, Any]] = []
        if system is not None or tools:
            self.messages.append({"role": "system", "content": system or "", "tools": tools or []})
        self.generation: Generation | None = None

    def send(self, content: str) -> Iterator[tuple[str, bool]]:
        """Adds a user's turn; yields the answer's text in parts, each with whether it is reasoning.

        Tool calls are not among the parts: they are in the last of `messages`, if they parse.
        """
        self.messages.append({"role": "user", "content": content})
        yield from self._answer()

    def give_results(self, results: list[str]) -> Iterator[tuple[str, bool]]:
        """Adds the results of the last answer's tool calls; yields as `send`."""
        self.messages += [{"role": "tool", "content": result} for result in results]
        yield from self._answer()

    @property
    def calls(self) -> list[Call]:
        """The tool calls of the last answer."""
        return [Call.model_validate(call) for call in self.messages[-1].get("tool_calls") or []]

    def _answer(self) -> Iterator[tuple[str, bool]]:
        opened, tokenizer = self._opened, self._opened.tokenizer
        question = encode(read_messages(self.messages, self._effort), tokenizer, self._prompts)
        request = self._request([tokenizer.bos_id, *question])
        self.generation = Generation(opened.model, request, opened.ranks, opened.attention)
        answer: list[int] = []
        with opened.rounding():
            yield from _parts(tokenizer, self._generate(answer), self._effort != "none")
        self.messages.append(self._message(question, answer))

    def _generate(self, answer: list[int]) -> Iterator[int]:
        assert self.generation is not None
        for _, token in self.generation:
            answer.append(token)
            yield token

    def _request(self, ids: list[int]) -> Request:
        longest = self._opened.model.config.max_position_embeddings
        room = min(self._max_new_tokens, longest - len(ids))
        if room < 1:
            raise ConfigError(
                f"v4 chat: the conversation has {len(ids):,} tokens, and the model's "
                f"max_position_embeddings is {longest:,}"
            )
        stop = frozenset({self._opened.tokenizer.eos_id})
        seed = self._seed + len(self.messages)
        return Request([ids], room, self._sampling, stop, seed, speculative=True)

    def _message(self, question: list[int], answer: list[int]) -> dict[str, Any]:
        """Returns the answer as a message; as plain text where it does not follow the form.

        Reasoning without an end stays reasoning, which later turns do not see.
        """
        tokenizer = self._opened.tokenizer
        end = [] if answer[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
        if end:
            self._warn(f"the answer ended at its limit of {len(answer):,} tokens")
        plain = [token for token in answer if token not in tokenizer.special.values()]
        if self._effort != "none" and tokenizer.special.get("</think>") not in answer:
            self._warn("its reasoning has no end, and is not an answer for the next turn")
            reasoning = tokenizer.decode(plain)
            return {"role": "assistant", "content": "", "reasoning_content": reasoning}
        try:
            message = decode([*question, *answer, *end], tokenizer, self._prompts).messages[-1]
            assert isinstance(message, Assistant)
            fields = message.model_dump(exclude={"task"})
            read_messages([*self.messages, fields], self._effort)
        except DataError as error:
            self._warn(f"the answer is kept as text: {error}")
            fields = {"role": "assistant", "content": tokenizer.decode(plain)}
        return fields

    def _warn(self, text: str) -> None:
        if self._opened.is_first:
            print_line(f"v4: warning: {text}", sys.stderr)


def _parts(tokenizer: Tokenizer, tokens: Iterator[int], thinks: bool) -> Iterator[tuple[str, bool]]:
    """Yields the text of an answer up to its tool calls, in parts, with whether it is reasoning."""
    decoder, pending = Decoder(tokenizer), ""
    end_think, dsml = tokenizer.special.get("</think>"), tokenizer.special.get("｜DSML｜")
    for token in tokens:
        if token == end_think:
            yield pending + decoder.end(), thinks
            decoder, pending, thinks = Decoder(tokenizer), "", False
        elif token == dsml:
            for _ in tokens:  # the calls, which are shown when they are complete
                pass
            return
        elif token != tokenizer.eos_id:
            text, pending = _without_opening(pending + decoder.add(token))
            yield text, thinks
    yield pending + decoder.end(), thinks


def _without_opening(text: str) -> tuple[str, str]:
    """Splits off an end that may be the beginning of tool calls."""
    size = max(n for n in range(len(OPENING) + 1) if text.endswith(OPENING[:n]))
    return text[: len(text) - size], text[len(text) - size :]


def chat_command(folder: str, options: argparse.Namespace) -> None:
    """Talk to a model: a line of standard input is a turn, an empty one or its end ends it."""
    prompts = OWN_PROMPTS if options.prompts is None else read_prompts(Path(options.prompts))
    tools = None if options.tools is None else _read_tools(Path(options.tools))
    with ExitStack() as stack:
        with Activity("loading the model", visible=os.environ.get("RANK", "0") == "0"):
            opened = stack.enter_context(open_shared(folder))
        sampling = Sampling(options.temperature, options.top_p)
        seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
        seed = opened.ranks.from_first(lambda: seed)
        length, system = options.max_new_tokens, options.system
        chat = Chat(opened, options.think, sampling, length, seed, prompts, system, tools)
        _converse(chat, opened)


def _converse(chat: Chat, opened: OpenedModel) -> None:
    """Answers turns until there is none. The first process reads and prints, for all of them."""

    def ask(prompt: str) -> str | None:
        return opened.ranks.from_first(lambda: _ask(prompt))

    def show(parts: Iterator[tuple[str, bool]]) -> None:
        if opened.is_first:
            _show(chat, parts)
        else:
            deque(parts, maxlen=0)

    while turn := ask("> "):
        show(chat.send(turn))
        while chat.calls:
            results = [ask(f"result of {call.name}: ") for call in chat.calls]
            if None in results:
                return
            show(chat.give_results([result for result in results if result is not None]))


def _ask(prompt: str) -> str | None:
    """Reads a line; None at the end of the input."""
    if sys.stdin.isatty():
        print(prompt, end="", flush=True)
    line = sys.stdin.readline()
    require_utf8(line, "v4 chat: a line")
    return line.removesuffix("\n") if line else None


def _show(chat: Chat, parts: Iterator[tuple[str, bool]]) -> None:
    """Prints an answer as it grows, reasoning dimmed, then its tool calls and the speed."""
    has_colour = sys.stdout.isatty()
    was_reasoning = False
    with line_ends():
        for text, is_reasoning in parts:
            if was_reasoning and not is_reasoning:
                print("\n", flush=True)
            was_reasoning = is_reasoning
            dimmed = has_colour and is_reasoning
            print(f"{DIM}{text}{PLAIN}" if dimmed else text, end="", flush=True)
    print(flush=True)
    for call in chat.calls:
        print(f"calls {call.name}({json.dumps(call.arguments, ensure_ascii=False)})", flush=True)
    assert chat.generation is not None
    print_line(summary(chat.generation.statistics), sys.stderr)


def _read_tools(path: Path) -> list[Any]:
    """Reads a JSON list of tool definitions. Raises ConfigError for other files."""
    try:
        tools = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None
    if not isinstance(tools, list):
        raise ConfigError(f"{path}: should hold a list of tools, not a {type(tools).__name__}")
    return tools
