"""A model as lm-eval uses it: scores and continuations of tokens, on all ranks together.

lm-eval runs on the first rank alone, which reads the tasks' data and computes the metrics. Its
requests to the model are broadcast, and all ranks compute them as in training and generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data import Tokenizer
from model.config import AttentionMode
from trainer.engine import Engine
from trainer.evaluation.scoring import Continuation, RowSizes, Score, score
from trainer.evaluation.validation import check_stop
from trainer.generate.generate import Generation, Request
from trainer.generate.ranks import Ranks
from trainer.generate.sampling import Sampling
from trainer.parallel.collectives import broadcast_object
from trainer.parallel.grid import Grid
from trainer.process.errors import TaskError
from trainer.process.heartbeat import Heartbeat
from trainer.process.signals import StopRequest

Item = TypeVar("Item")


@dataclass(frozen=True)
class Texts:
    """Prompts to continue, all with the same settings.

    Attributes:
        prompts: token ids of each.
        until: strings, of which the first one to appear ends a text, and is not part of it.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    until: Sequence[str]
    sampling: Sampling


class SharedModel:
    """The model of all ranks; every method is called on each of them with the same arguments.

    Attributes:
        max_length: maximum number of tokens that the model reads.
        has_all_layers: whether a process has them, as continuing texts needs; not with a pipeline.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        attention: AttentionMode,
        sizes: RowSizes,
        stop: StopRequest | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Wraps an engine's model.

        `attention` is that of CSA layers in continued texts; `sizes` is that of packed rows.
        """
        self.tokenizer, self.max_length = tokenizer, engine.model.config.max_position_embeddings
        self.has_all_layers = engine.grid.pipeline.size == 1
        self._engine, self._attention, self._sizes = engine, attention, sizes
        self._stop, self._heartbeat = stop or StopRequest(), heartbeat or Heartbeat()

    def score(self, continuations: Sequence[Continuation]) -> list[Score]:
        """Returns the score of each continuation. Raises EvaluationStopped on all ranks."""
        return score(self._engine, continuations, self._sizes, self._before_batch)

    def continue_texts(self, texts: Texts) -> list[str]:
        """Returns what follows each prompt. Raises EvaluationStopped on all ranks."""
        order = sorted(range(len(texts.prompts)), key=lambda i: -len(texts.prompts[i]))
        results: list[str] = [""] * len(order)
        budget = self._sizes.seq_len * self._sizes.rows  # tokens that a cache may have
        done = 0
        while done < len(order):
            self._before_batch(done, len(order))
            longest = len(texts.prompts[order[done]]) + texts.max_new_tokens
            group = order[done : done + max(budget // longest, 1)]
            for index, text in zip(group, self._continue(texts, group, done), strict=True):
                results[index] = text
            done += len(group)
        return results

    def _continue(self, texts: Texts, group: Sequence[int], seed: int) -> list[str]:
        engine, special = self._engine, self.tokenizer.special
        # Special tokens are hidden in the text, where strings are looked for.
        stop = {self.tokenizer.eos_id, *(special[end] for end in texts.until if end in special)}
        request = Request(
            [texts.prompts[index] for index in group],
            texts.max_new_tokens,
            texts.sampling,
            frozenset(stop),
            seed=seed,
            speculative=True,
        )
        tokens: list[list[int]] = [[] for _ in group]
        # A token is at least a byte of text, so this many tokens contain any stop string.
        reach = max((len(text.encode()) for text in texts.until), default=0)
        with engine.computing():
            generation = Generation(engine.model, request, Ranks(engine.grid), self._attention)
            for index, token in generation:
                tokens[index].append(token)
                tail = self._text(tokens[index][-reach - 1 :])
                if any(text in tail for text in texts.until):
                    generation.end(index)
        return [_before(self._text(ids), texts.until) for ids in tokens]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, hide_special=True)

    def _before_batch(self, done: int, total: int) -> None:
        self._heartbeat.enter("evaluating tasks")
        check_stop(self._stop, self._engine.grid, f"in its tasks, after {done} of {total} batches")


def _before(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text


@dataclass(frozen=True)
class _End:
    """The last message of the first rank."""

    problem: str | None = None


def lead(
    grid: Grid, work: Callable[[Any], Any], body: Callable[[Callable[[Any], Any]], Item]
) -> Item | None:
    """Runs `body` on the first rank, and each `work` that it requests on all ranks together.

    `body` gets a function that broadcasts an item and returns the first rank's result of `work` on
    it. Returns the result of `body` on the first rank, None on the others.

    Raises TaskError on all ranks where `body` fails by itself.
    """
    if not grid.is_first:
        while not isinstance(item := broadcast_object(None, grid.world), _End):
            work(item)
        if item.problem is not None:
            raise TaskError(item.problem)
        return None
    is_shared = False

    def call(item: Any) -> Any:
        nonlocal is_shared
        is_shared = True  # what fails now fails on all ranks
        broadcast_object(item, grid.world)
        result = work(item)
        is_shared = False
        return result

    try:
        result = body(call)
    except Exception as error:
        if is_shared:
            raise
        problem = str(error) if isinstance(error, TaskError) else _sentence(error)
        broadcast_object(_End(problem), grid.world)
        raise TaskError(problem) from error
    broadcast_object(_End(), grid.world)
    return result


def _sentence(error: Exception) -> str:
    """Returns what went wrong in lm-eval or in a library that it uses, in one line."""
    text = " ".join(str(error).split())
    return f"lm-eval: {type(error).__name__}: {text}" if text else f"lm-eval: {error!r}"
