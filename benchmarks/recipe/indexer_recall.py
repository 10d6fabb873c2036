"""The indexers' recall in a finished run, and the cost of sparse attention.

    python -m benchmarks.recipe.indexer_recall runs/recipe-demo

The run must have kept its checkpoints at the end of its warm-up and at the step before it
(`checkpoint.keep: 0`; the nearest ones are taken). On the validation rows, with the weights at the
end of the warm-up, it prints the loss with dense and with sparse attention, and for every CSA
layer the fraction of the dense attention probability mass on the entries that the indexer selects
when each query may keep a quarter of the entries that it sees; next to it the same for the indexer
before its warm-up, for the entries with most mass, and for random entries. Queries that see fewer
than eight entries are ignored. Then the same for all queries with the model's `index_topk`, and as
a fraction of all that a query attends to, including the window, which no selection can lose.

    python -m benchmarks.recipe.indexer_recall runs/recipe-demo --sharpen 16 --steps 50 --rate 4e-2

makes the attention of the weights before the warm-up less uniform, by scaling the norms of the CSA
layers' entries, and runs a warm-up of the indexers itself.

Letters: T tokens, D hidden size, Q query rank, H heads, K head dim, C entries.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from data import Loader
from model import SampleLayout, TokenCounts, V4Model
from model.attention import Attention
from model.config import AttentionMode
from model.exchange import LocalExchange
from model.kernels.attention import AttentionInputs, attention_with_lse2
from model.kernels.indexer import attention_probability_mass
from model.kernels.indexer.naive import naive_scores
from model.kernels.norm import rotate
from model.parameters import expert_name, official_name
from model.positions import Positions
from trainer.build import build_native
from trainer.checkpoint import CheckpointReader, checkpoints_in, step_of
from trainer.config import RunConfig, load_run
from trainer.engine import NativeEngine
from trainer.evaluation import Validation
from trainer.parallel.grid import Grid

MIN_ENTRIES = 8
Mass = tuple[float, float]
"""Probability mass on selected entries, and the mass that they are compared with."""


def load(model: V4Model, path: Path) -> None:
    """Loads the weights of a checkpoint, where each expert's matrix is an entry, into the model."""
    reader, state = CheckpointReader(path), {}
    for name, tensor in model.state_dict().items():
        stacked = ".experts.w" in name
        names = [official_name(name)]
        if stacked:
            names = [expert_name(name, expert) for expert in range(len(tensor))]
        values = reader.read(dict.fromkeys(names, tensor.dtype))
        state[name] = torch.stack([values[n] for n in names]) if stacked else values[names[0]]
    model.load_state_dict(state)


def attention_of(attn: Attention, x_TD: Tensor, positions: Positions) -> AttentionInputs:
    """Returns the inputs of a layer's core attention."""
    assert attn.compressor is not None
    return AttentionInputs(
        attn.wq_b(attn.q_norm(attn.wq_a(x_TD))).unflatten(-1, (-1, attn.head_dim)),
        rotate(attn.kv_norm(attn.wkv(x_TD)), positions.rotation("csa")),
        attn.compressor(x_TD, positions, LocalExchange()),
        attn.attn_sink,
        positions.query_rotation("csa"),
        positions.query_ranges("csa"),
        window=attn.window,
        norm_eps=attn.eps,
    )


def masses(attn: Attention, x_TD: Tensor, positions: Positions) -> dict[str, Mass]:
    """Returns selected and total probability mass by kind of selection, over queries."""
    assert attn.indexer is not None
    inputs = attention_of(attn, x_TD, positions)
    assert inputs.entries_CK is not None
    _, lse2 = attention_with_lse2(inputs)
    mass = attention_probability_mass(inputs, lse2)
    count = len(inputs.entries_CK)
    mass_TC = mass(slice(0, len(x_TD)), slice(0, count))
    index = attn.indexer(x_TD, attn.q_norm(attn.wq_a(x_TD)), positions, LocalExchange())
    scores_TC = naive_scores(index.q_TIJ, index.keys_CJ, index.weights_TI)
    ranges, entry_C = positions.ranges("csa"), torch.arange(count)
    visible_TC = entry_C >= ranges.entry_start_T[:, None]
    visible_TC &= entry_C < ranges.entry_end_T[:, None]
    real_T = ~positions.layout.padding_T
    counted_T = (visible_TC.sum(1) >= MIN_ENTRIES) & real_T
    quarter_T = visible_TC.sum(1) // 4
    sink_TH = torch.exp2(attn.attn_sink * math.log2(math.e) - lse2)
    attended_T = (1.0 - sink_TH).sum(1)  # by all heads, to window and entries
    generator = torch.Generator().manual_seed(0)
    selections = {
        "indexer": scores_TC,
        "most mass": mass_TC,
        "at random": torch.rand(scores_TC.shape, generator=generator),
    }
    result: dict[str, Mass] = {}
    for name, values_TC in selections.items():
        order_TC = values_TC.masked_fill(~visible_TC, -torch.inf).argsort(1, descending=True)
        rank_TC = order_TC.argsort(1)
        selected_TC = mass_TC * (rank_TC < quarter_T[:, None])
        result[name] = (_sum(selected_TC, counted_T), _sum(mass_TC, counted_T))
        selected_TC = mass_TC * (rank_TC < attn.indexer.topk)
        result[f"{name}, top-k"] = (_sum(selected_TC, real_T), _sum(mass_TC, real_T))
        lost_T = (mass_TC - selected_TC).sum(1)
        result[f"{name}, all"] = (_sum(attended_T - lost_T, real_T), _sum(attended_T, real_T))
    return result


def _sum(values: Tensor, queries_T: Tensor) -> float:
    return float(values[queries_T].sum())


@torch.no_grad()
def recall(config: RunConfig, model: V4Model, steps: int) -> dict[int, dict[str, float]]:
    """Returns the fraction that each selection keeps, by layer, over validation rows."""
    sums: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    calls: list[tuple[int, Tensor, Positions]] = []
    hooks = [
        attn.register_forward_pre_hook(
            lambda _, inputs, row=row: calls.append((row, inputs[0], inputs[1]))
        )
        for row, attn in model.attentions().items()
        if attn.indexer is not None
    ]
    loader = Loader(config.data, config.seed, split="validation")
    for step in range(steps):
        for batch in loader.at(step):
            layout = SampleLayout.from_lengths(batch.lengths, batch.tokens.shape[1])
            counts = TokenCounts(1, 1, 1)
            model(batch.tokens, layout, batch.targets, counts, attention="dense")
            for row, x_TD, positions in calls:
                results = masses(model.attentions()[row], x_TD, positions)
                for name, (selected, total) in results.items():
                    sums[row][name][0] += selected
                    sums[row][name][1] += total
            calls.clear()
    for hook in hooks:
        hook.remove()
    return {
        row: {name: selected / total for name, (selected, total) in by_name.items()}
        for row, by_name in sums.items()
    }


@torch.no_grad()
def sharpen(model: V4Model, factor: float) -> None:
    """Scales the entries, which makes the attention over them less uniform."""
    for attn in model.attentions().values():
        if attn.indexer is not None and attn.compressor is not None:
            attn.compressor.norm.weight.mul_(factor)


def warm_up(engine: NativeEngine, loader: Loader, steps: int, rate: float) -> None:
    """Trains the indexers alone, on rows of the loader."""
    engine.set_attention("warmup")
    for step in range(steps):
        losses = engine.forward_backward(loader.at(200 + step))
        engine.step(rate, engine.gradient_norm())
        print(f"warm-up, step {step + 1}: {float(losses.indexer):.3f}", flush=True)


def print_tables(
    untrained: dict[int, dict[str, float]], trained: dict[int, dict[str, float]]
) -> None:
    """Prints a Markdown table for each way of counting."""
    titles = {
        "a quarter of the visible entries": "",
        "index_topk": ", top-k",
        "index_topk, window included": ", all",
    }
    for title, suffix in titles.items():
        print(f"| layer, {title} | untrained | after the warm-up | most mass | at random |")
        print("|---:|---:|---:|---:|---:|")
        for row, fractions in trained.items():
            columns = [fractions[name + suffix] for name in ("indexer", "most mass", "at random")]
            columns.insert(0, untrained[row]["indexer" + suffix])
            print(f"| {row} | " + " | ".join(f"{fraction:.1%}" for fraction in columns) + " |")


def main() -> None:
    """Measures before and after the warm-up and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=32, help="validation rows")
    parser.add_argument("--sharpen", type=float, help="factor of the entries' norms")
    parser.add_argument("--steps", type=int, default=50, help="steps of the warm-up with --sharpen")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of this warm-up")
    options = parser.parse_args()
    rows = f"evaluation.max_rows={options.rows}"
    config, grid = load_run(options.run, [rows]).alone(), Grid.single(torch.device("cpu"))
    warmup = next(s for s in config.recipe.phases if s.attention == "warmup")
    saved = {step_of(path): path for path in checkpoints_in(config.run_dir / "checkpoints")}
    before = max(step for step in saved if step <= warmup.first)
    after = max(step for step in saved if warmup.first < step <= warmup.end)
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    validation = Validation(config, grid)
    load(local.model, saved[before])
    if options.sharpen:
        sharpen(local.model, options.sharpen)
    untrained = recall(config, local.model, validation.steps)
    if options.sharpen:
        optimizer.read_parameters()
        warm_up(engine, Loader(config.data, config.seed), options.steps, options.rate)
    else:
        load(local.model, saved[after])
    trained = recall(config, local.model, validation.steps)
    modes: tuple[AttentionMode, ...] = ("dense", "select")
    losses = []
    for mode in modes:
        engine.set_attention(mode)
        losses.append(validation.evaluate(engine).loss)
    print(
        f"checkpoints of step {before} and {after}; warm-up of steps {warmup.first} to {warmup.end}"
    )
    dense, sparse = losses
    print(f"validation loss, dense {dense:.4f}, sparse {sparse:.4f}: {sparse - dense:+.4f}")
    print_tables(untrained, trained)


if __name__ == "__main__":
    main()
