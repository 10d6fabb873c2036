"""Loads of the experts in a hash-routed layer, with tables of equal and of counted frequencies.

    python -m benchmarks.recipe.hash_loads CONFIG [key=value ...] [--steps 120]

Reads the training rows of the first steps, and no model: the table alone decides. For both tables
it prints the largest and the smallest load of an expert over the mean, of single steps (the median)
and of all steps together, and the largest over groups of experts on 8 ranks.
"""

import argparse
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.rows import Loader, token_frequencies
from model.router import balanced_table
from trainer.config import RunConfig, load_run

RANKS = 8


def loads_of(config: RunConfig, frequencies: list[float] | None, tokens: list[Tensor]) -> Tensor:
    """Returns the loads of every step, [steps, E]."""
    model = config.model
    table = balanced_table(
        torch.Generator().manual_seed(config.seed),
        model.vocab_size,
        model.n_routed_experts,
        model.num_experts_per_tok,
        frequencies,
    )
    loads = [table[ids].flatten().bincount(minlength=model.n_routed_experts) for ids in tokens]
    return torch.stack(loads).double()


def ratio(load_E: Tensor) -> tuple[float, float, float]:
    """Returns the largest and the smallest load, and that of a rank, over the mean."""
    rank = load_E.view(RANKS, -1).sum(1) if len(load_E) % RANKS == 0 else load_E
    return (
        float(load_E.max() / load_E.mean()),
        float(load_E.min() / load_E.mean()),
        float(rank.max() / rank.mean()),
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    config = load_run(options.config, options.overrides)
    loader = Loader(config.data, config.seed, phases=[p.rows for p in config.recipe.phases])
    frequencies = token_frequencies(loader)
    if frequencies is None:
        raise SystemExit(f"{config.data.shards} has no counts of ids")
    tokens = [
        torch.cat(
            [
                batch.tokens[row, : sum(lengths)]
                for batch in loader.at(step)
                for row, lengths in enumerate(batch.lengths)
            ]
        )
        for step in range(options.steps)
    ]
    padded = [*frequencies.tolist(), *[0.0] * (config.model.vocab_size - len(frequencies))]
    table = Table("load over the mean", "step: max", "min", "rank", "all: max", "min", "rank")
    for name, values in (("equal frequencies", None), ("counted", padded)):
        load = loads_of(config, values, tokens)
        steps = [median(column) for column in zip(*map(ratio, load), strict=True)]
        table.add_row(name, *(f"{value:.2f}" for value in (*steps, *ratio(load.sum(0)))))
    Console(width=120).print(table)
    most = float(frequencies.max())
    share = config.model.n_routed_experts / config.model.num_experts_per_tok
    print(f"the most frequent id is {most:.2%} of the inputs: a load of {most * share:.2f} means")


if __name__ == "__main__":
    main()
