"""Tokens per second and memory of forward and backward, compared with transformers, in one run.

Both models have the same weights and the same tokens; the loss is the cross-entropy of the next
token. transformers has no multi-token prediction, so neither runs it here. Rows shorter than 2048
are batched. Each model is called once to warm up, which also measures its memory, and then timed;
ours before and after transformers, because a machine's speed drifts. The best call counts.

    python -m benchmarks.steps.vs_transformers [CONFIG] [--lengths 512 2048 8192] [--threads 2]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model import ModelConfig, V4Model
from model.flops import training_flops
from trainer.config import load_config

CALL_TOKENS = 2048
ROUNDS = {512: 4, 2048: 3, 8192: 1}
"""Timed calls of transformers by row length; ours gets three more each time."""


@dataclass
class Measured:
    """The best call of one implementation at one row length."""

    tokens_per_second: float
    peak_memory: int


def matmul_rate(size: int = 2048, rounds: int = 8) -> float:
    """Returns the best rate of an fp32 matmul, in FLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(rounds))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object]) -> int:
    """Returns the growth of the process during the call, in bytes (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed earlier would be reused unnoticed
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def build(config: ModelConfig) -> tuple[V4Model, DeepseekV4ForCausalLM]:
    """Returns our model and transformers' with the same weights."""
    ours = V4Model(config)
    ours.init_weights(seed=1)
    theirs_config = DeepseekV4Config(**config.to_hf())
    theirs_config._attn_implementation = "eager"  # the only one that transformers has for V4
    theirs = DeepseekV4ForCausalLM(theirs_config).float().train()
    theirs.load_state_dict(ours.hf_state_dict())
    return ours, theirs


def calls(
    ours: V4Model, theirs: DeepseekV4ForCausalLM, length: int, rows: int
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Returns forward and backward of each on the same rows, and the tokens in them."""
    generator = torch.Generator().manual_seed(length)
    vocab = ours.config.vocab_size
    tokens = torch.randint(3, vocab, (rows, length + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run_ours() -> None:
        ours.zero_grad()
        loss = ours(inputs, targets=targets).loss
        assert loss is not None
        loss.backward()

    def run_theirs() -> None:
        theirs.zero_grad()
        logits: Tensor = theirs(inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    return run_ours, run_theirs, rows * length


def measure(ours: V4Model, theirs: DeepseekV4ForCausalLM, length: int) -> list[Measured]:
    """Measures both implementations at one row length."""
    run_ours, run_theirs, tokens = calls(ours, theirs, length, max(CALL_TOKENS // length, 1))
    rounds = ROUNDS.get(length, 1)
    peak_ours, before = timed(run_ours, rounds + 3)
    peak_theirs, seconds_theirs = timed(run_theirs, rounds)
    _, after = timed(run_ours, rounds + 3)
    return [
        Measured(tokens / min(before, after), peak_ours),
        Measured(tokens / seconds_theirs, peak_theirs),
    ]


def timed(call: Callable[[], object], rounds: int) -> tuple[int, float]:
    """Returns the peak memory of a first call, and the seconds of the best of ``rounds`` more."""
    return peak_memory(call), min(_seconds(call) for _ in range(rounds))


def table_of(
    lengths: list[int], results: dict[int, list[Measured]], config: ModelConfig, rate: float
) -> Table:
    """Returns a table with a line for each row length."""
    table = Table(title="forward and backward, fp32")
    for column in (
        "row length",
        "ours, tokens/s",
        "transformers, tokens/s",
        "ratio",
        "ours, share of matmul rate",
        "ours, peak MB",
        "transformers, peak MB",
    ):
        table.add_column(column, justify="right")
    for length in lengths:
        ours, theirs = results[length]
        flops = training_flops(config, [length]) / length * ours.tokens_per_second
        table.add_row(
            str(length),
            f"{ours.tokens_per_second:,.0f}",
            f"{theirs.tokens_per_second:,.0f}",
            f"{ours.tokens_per_second / theirs.tokens_per_second:.1f}x",
            f"{flops / rate:.0%}",
            f"{ours.peak_memory / 1e6:,.0f}",
            f"{theirs.peak_memory / 1e6:,.0f}",
        )
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/debug.yaml")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    plain = {"num_nextn_predict_layers": 0, "balance_loss_weight": 0.0}
    config = load_config(arguments.config).model.model_copy(update=plain)
    ours, theirs = build(config)
    parameters = sum(p.numel() for p in ours.parameters())
    rates = [matmul_rate()]
    console.print(
        f"{arguments.config}: {parameters / 1e6:.1f}M parameters without MTP; "
        f"{arguments.threads} threads of {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}"
    )
    results = {}
    for length in arguments.lengths:
        with console.status(f"row length {length} ..."):
            results[length] = measure(ours, theirs, length)
        rates.append(matmul_rate())
    console.print(table_of(arguments.lengths, results, config, max(rates)))
    console.print(
        f"fp32 matmul rate of this machine: {max(rates) / 1e9:.0f} GFLOP/s "
        f"(between measurements: {', '.join(f'{r / 1e9:.0f}' for r in rates)})"
    )
    if {2048, 8192} <= results.keys():
        share = results[8192][0].tokens_per_second / results[2048][0].tokens_per_second
        growth = results[8192][0].peak_memory / results[2048][0].peak_memory
        console.print(
            f"ours at 8192 relative to 2048: {share:.2f} of the tokens/s, {growth:.1f} of the peak"
        )


if __name__ == "__main__":
    main()
