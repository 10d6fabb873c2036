"""`v4 generate`: continues prompts on the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data import Tokenizer
from data.activity import Activity, print_line
from trainer.config import ConfigError
from trainer.generate.generate import Generation, Request, Statistics, prompt_ids
from trainer.generate.load import OpenedModel, open_shared
from trainer.generate.sampling import Sampling

INCOMPLETE = "�"
"""How the end of a text is decoded while tokens of its last character are missing."""


def generate_command(folder: str, options: argparse.Namespace) -> None:
    """Continue prompts with the newest checkpoint of a run, or a Hugging Face folder."""
    is_first = os.environ.get("RANK", "0") == "0"
    own = _prompts(options) if is_first else []
    with ExitStack() as stack:
        with Activity("loading the model", visible=is_first):
            opened = stack.enter_context(open_shared(folder))
        prompts = opened.ranks.from_first(lambda: own)
        request = _request(opened, prompts, options)
        stack.enter_context(opened.rounding())
        generation = Generation(opened.model, request, opened.ranks, opened.attention)
        if not opened.is_first:
            deque(generation, maxlen=0)
            return
        if options.json:
            _print_json(opened.tokenizer, prompts, generation)
        elif len(prompts) == 1:
            _stream(opened.tokenizer, prompts[0], generation)
        else:
            _print_texts(opened.tokenizer, prompts, generation)
        print_line(summary(generation.statistics), sys.stderr)


def _prompts(options: argparse.Namespace) -> list[str]:
    """Returns the prompts of the command line, a file's lines, or standard input as one prompt.

    A line ends with a line feed, perhaps after a carriage return. The one that ends standard input
    is not part of the prompt.
    """
    prompts: list[str] = list(options.prompt)
    if options.file is not None:
        text = sys.stdin.read() if options.file == "-" else _read(Path(options.file))
        prompts += [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n") if text]
    elif not prompts:
        if sys.stdin.isatty():
            raise ConfigError("v4 generate: no prompt; name one, --file, or write it to stdin")
        prompts = [sys.stdin.read().removesuffix("\n")]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ConfigError(f"v4 generate: prompt {number} of {len(prompts)} is empty")
        require_utf8(prompt, f"v4 generate: prompt {number} of {len(prompts)}")
    if not prompts:
        raise ConfigError(f"v4 generate: {options.file} has no line")
    return prompts


def _read(path: Path) -> str:
    """Reads a text; bytes that are not UTF-8 become surrogates, as in arguments and stdin."""
    return path.read_bytes().decode(errors="surrogateescape")


def require_utf8(text: str, place: str) -> None:
    """Raises ConfigError where bytes of a text were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ConfigError(f"{place} is not UTF-8: its byte {byte:#x} stands for nothing") from None


def _request(opened: OpenedModel, prompts: Sequence[str], options: argparse.Namespace) -> Request:
    tokenizer, longest = opened.tokenizer, opened.model.config.max_position_embeddings
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for number, tokens in enumerate(ids, start=1):
        if len(tokens) + options.max_new_tokens > longest:
            raise ConfigError(
                f"v4 generate: prompt {number} has {len(tokens):,} tokens, and with "
                f"{options.max_new_tokens:,} new ones exceeds model.max_position_embeddings = "
                f"{longest:,}"
            )
    if options.packed and opened.quantisation != "mxfp4":
        raise ConfigError(
            "v4 generate --packed: the cache's formats are those of a model that was trained with "
            "quantisation = mxfp4, and this one was not"
        )
    return Request(
        ids,
        options.max_new_tokens,
        Sampling(options.temperature, options.top_p),
        frozenset({tokenizer.eos_id, *(_stop_id(tokenizer, text) for text in options.stop)}),
        options.seed,
        not options.no_speculation,
        options.packed,
    )


def _stop_id(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, allow_special=True)
    if len(ids) != 1:
        raise ConfigError(f"--stop {text!r}: should be one token, and is {len(ids)}")
    return ids[0]


class Decoder:
    """Decodes tokens one after another, holding those of an incomplete character back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def add(self, token: int) -> str:
        """Returns the text that the token completes, if any."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(INCOMPLETE):
            return ""
        self._ids = []
        return text

    def end(self) -> str:
        """Returns what is left."""
        return self._tokenizer.decode(self._ids)


def _stream(tokenizer: Tokenizer, prompt: str, generation: Generation) -> None:
    """Prints prompt and continuation, each part of a text as soon as it is known."""
    decoder = Decoder(tokenizer)
    print(prompt, end="", flush=True)
    with line_ends():
        for _, token in generation:
            if token not in generation.request.stop:
                print(decoder.add(token), end="", flush=True)
    print(decoder.end(), flush=True)


@contextmanager
def line_ends() -> Iterator[None]:
    """Ends the line of a stream that Ctrl-C interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        print(flush=True)
        raise


def _texts(
    tokenizer: Tokenizer, prompts: Sequence[str], generation: Generation
) -> Iterator[dict[str, Any]]:
    """Yields each prompt's result, in order, as soon as it and those before it are complete."""
    request, number = generation.request, 0
    ids: list[list[int]] = [[] for _ in prompts]
    for index, token in generation:
        ids[index].append(token)
        while number < len(ids) and (tokens := ids[number]):
            stopped = tokens[-1] in request.stop
            if not stopped and len(tokens) < request.max_new_tokens:
                break
            decoder = Decoder(tokenizer)
            text = "".join(map(decoder.add, tokens[: len(tokens) - stopped])) + decoder.end()
            finish = "stop" if stopped else "length"
            yield {
                "prompt": prompts[number],
                "text": text,
                "tokens": len(tokens),
                "finish": finish,
            }
            number += 1


def _print_texts(tokenizer: Tokenizer, prompts: Sequence[str], generation: Generation) -> None:
    for number, result in enumerate(_texts(tokenizer, prompts, generation), start=1):
        print(f"--- {number} of {len(prompts)}")
        print(result["prompt"] + result["text"], flush=True)


def _print_json(tokenizer: Tokenizer, prompts: Sequence[str], generation: Generation) -> None:
    for result in _texts(tokenizer, prompts, generation):
        print(json.dumps(result, ensure_ascii=False), flush=True)


def summary(statistics: Statistics) -> str:
    """Returns a line about the speed, and the share of drafts that were accepted."""
    text = f"{statistics.new_tokens:,} tokens"
    if statistics.decoded_tokens:
        text += f", {statistics.tokens_per_second:,.1f} tokens/s"
    prompt = f"{statistics.prompt_tokens:,} tokens in {statistics.prefill_seconds:.2f} s"
    text += f"; prompt of {prompt}"
    if statistics.drafts:
        share = statistics.accepted_drafts / statistics.drafts
        text += f"; {share:.0%} of {statistics.drafts:,} MTP drafts accepted"
    return text
