"""Decoding, ours and with transformers' cache: tokens/s, the indexer's share and bytes, by context.

Both models have the same weights and decode one sequence token by token, in turns of a few tokens,
since a machine's speed drifts. The time per token is the median. Prompts are random; transformers
reads them in chunks.

    python -m benchmarks.generate.decode [RUN] [--contexts 512 4096 32768] [--tokens 24]

`--threads` is 2 by default. `--cpu-time` counts the CPU time of the process, in one thread, for
machines that run other programs as well. Without a run, the weights are those of the demo's config
at its start. Its positions are raised where a context needs more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model import ModelConfig, V4Model
from model.cache import CachedModel
from model.cache.sizes import cache_bytes
from trainer.config import load_config
from trainer.generate import open_model

DEMO = Path(__file__).parents[2] / "configs/recipe-demo.yaml"
CHUNK = 512
TURN = 4
Clock = Callable[[], float]


@dataclass
class Times:
    """Seconds of each token, and of the indexers within it."""

    tokens: list[float] = field(default_factory=list)
    indexers: list[float] = field(default_factory=list)

    @property
    def token(self) -> float:
        return statistics.median(self.tokens)

    @property
    def indexer(self) -> float:
        return statistics.median(self.indexers)


def model_of(run: str | None, longest: int) -> V4Model:
    """Returns the model in fp32, with positions for `longest` tokens."""
    if run is None:
        source = V4Model(load_config(DEMO).model)
        source.init_weights(seed=1)
    else:
        source = open_model(Path(run)).model
    positions = max(source.config.max_position_embeddings, longest)
    model = V4Model(source.config.model_copy(update={"max_position_embeddings": positions}))
    model.load_hf_state_dict({n: t.float() for n, t in source.hf_state_dict().items()})
    return model.eval()


def twin_of(model: V4Model) -> DeepseekV4ForCausalLM:
    """Returns transformers' model with the same weights."""
    config = DeepseekV4Config(**model.config.to_hf())
    config._attn_implementation = "eager"  # the only one that transformers has for V4
    twin = DeepseekV4ForCausalLM(config).float().eval()
    twin.load_state_dict(
        {n: t for n, t in model.hf_state_dict().items() if not n.startswith("mtp.")}
    )
    return twin


class IndexerClock:
    """Counts the seconds that a model's indexers take to select."""

    def __init__(self, model: V4Model, clock: Clock) -> None:
        self.seconds, self._clock = 0.0, clock
        for layer in model.layers:
            if layer.attn.indexer is not None:
                layer.attn.indexer.select = self._timed(layer.attn.indexer.select)

    def _timed(self, select: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = self._clock()
            selected = select(*arguments)
            self.seconds += self._clock() - start
            return selected

        return run


class Ours:
    """Our cache after a prompt; calling it decodes one token."""

    def __init__(
        self, model: V4Model, prompt: Tensor, tokens: int, clock: Clock, indexers: IndexerClock
    ) -> None:
        self.times, self._clock, self._indexers = Times(), clock, indexers
        self._cached = CachedModel(model, 1, len(prompt) + tokens)
        for part in prompt.split(2048):
            self._streams = self._cached.forward(part, [len(part)])[-1:]

    def __call__(self) -> None:
        self._indexers.seconds, start = 0.0, self._clock()
        token = self._cached.logits(self._streams).argmax(-1)
        self._streams = self._cached.forward(token, [1])
        self.times.tokens.append(self._clock() - start)
        self.times.indexers.append(self._indexers.seconds)

    @property
    def num_bytes(self) -> int:
        return sum(self._cached.cache.bytes_by_part().values())


class Theirs:
    """Cache of transformers after a prompt; calling it decodes one token."""

    def __init__(self, twin: DeepseekV4ForCausalLM, prompt: Tensor, clock: Clock) -> None:
        self.times, self._clock, self._twin, self._cache = Times(), clock, twin, None
        for part in prompt.split(CHUNK):
            self._step(part[None])

    @torch.no_grad()
    def _step(self, tokens: Tensor) -> None:
        output = self._twin(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._logits = output.past_key_values, output.logits[:, -1]

    def __call__(self) -> None:
        start = self._clock()
        self._step(self._logits.argmax(-1)[None])
        self.times.tokens.append(self._clock() - start)


def measure(
    model: V4Model, twin: DeepseekV4ForCausalLM, contexts: list[int], tokens: int, clock: Clock
) -> dict[int, tuple[Ours, Theirs]]:
    """Decodes `tokens` tokens after each context, ours and theirs and all contexts in turns."""
    generator = torch.Generator().manual_seed(0)
    prompts = {
        n: torch.randint(3, model.config.vocab_size, (n,), generator=generator) for n in contexts
    }
    indexers = IndexerClock(model, clock)
    both = {
        n: (Ours(model, prompt, tokens + TURN, clock, indexers), Theirs(twin, prompt, clock))
        for n, prompt in prompts.items()
    }
    for turn in range(0, tokens + TURN, TURN):
        for decoders in both.values():
            for decoder in decoders:
                for _ in range(TURN):
                    decoder()
        if not turn:  # the first turn warms up
            for ours, theirs in both.values():
                ours.times, theirs.times = Times(), Times()
    return both


def bytes_per_token(config: ModelConfig) -> float:
    """Returns the slope of the report's formula: cache bytes per token in a long context."""
    itemsize, many = 4, 128 * 1024
    first, second = (
        sum(cache_bytes(config, n, itemsize, False).values()) for n in (many, 2 * many)
    )
    return (second - first) / many


def _wall() -> float:
    return time.perf_counter()


def main() -> None:
    """Prints the table and the fit of bytes against context."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate.decode")
    parser.add_argument("run", nargs="?")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 32768])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    threads, clock = (1, time.process_time) if options.cpu_time else (options.threads, _wall)
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    model = model_of(options.run, max(options.contexts) + options.tokens + TURN)
    results = measure(model, twin_of(model), options.contexts, options.tokens, clock)
    kind = "CPU time" if options.cpu_time else "time"
    table = Table(title=f"decoding one sequence, fp32, {kind}")
    for column in (
        *("context", "ours, tokens/s", "transformers, tokens/s", "ours, ms", "indexers, ms"),
        *("the rest, ms", "cache, kB"),
    ):
        table.add_column(column, justify="right")
    for context, (ours, theirs) in results.items():
        times = ours.times
        table.add_row(
            f"{context:,}",
            f"{1 / times.token:.1f}",
            f"{1 / theirs.times.token:.1f}",
            f"{times.token * 1e3:.1f}",
            f"{times.indexer * 1e3:.2f}",
            f"{(times.token - times.indexer) * 1e3:.1f}",
            f"{ours.num_bytes / 1e3:,.0f}",
        )
    Console(width=120).print(table)
    slope, intercept = np.polyfit(
        options.contexts, [ours.num_bytes for ours, _ in results.values()], 1
    )
    print(f"bytes of cache: {slope:.2f} for a token + {intercept:,.0f}, by a linear fit")
    print(f"of the formula: {bytes_per_token(model.config):.2f} for a token")
    print(f"{threads} threads, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
