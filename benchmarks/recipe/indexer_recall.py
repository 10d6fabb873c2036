"""What the phases of a finished run did: the indexers' recall, and what sparse attention costs.

    python -m benchmarks.recipe.indexer_recall runs/recipe-demo

The run must have kept its checkpoints at the end of its warm-up and at the step before it
(`checkpoint.keep: 0`; the nearest ones are taken). On the validation rows, with the weights at the
end of the warm-up: the loss with dense and with sparse attention, and for every CSA layer the share
of the dense attention mass on entries that the indexer keeps when each query may keep a quarter of
the entries that it sees; beside it the same for the indexer before its warm-up, for the entries
with most mass, and for entries at random. Queries that see fewer than eight entries are left out.
Then the same for all queries with the model's own `index_topk`, of which early ones see no more,
and as a share of all that a query attends to: the window included, which no choice can lose.

    python -m benchmarks.recipe.indexer_recall runs/recipe-demo --sharpen 16 --steps 50 --rate 4e-2

makes the attention of the weights before the warm-up less even, by multiplying the norms of the CSA
layers' entries, and warms the indexers up here.
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
from model.positions import Positions
from trainer.build import build
from trainer.checkpoint.folder import checkpoints_in, step_of
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig, load_run
from trainer.engine import NativeEngine
from trainer.evaluate import Validation
from trainer.parallel.grid import Grid

LEAST = 8


def load(model: V4Model, path: Path) -> None:
    """The weights of a checkpoint into the model."""
    weights = model.state_dict()
    stored = CheckpointReader(path)
    found = stored.read({name: weights[name].dtype for name in weights if name in stored.shapes})
    rest = weights.keys() - found.keys()
    experts = [name for name in rest if ".experts.w" in name]
    assert len(experts) == len(rest), rest
    for name in experts:  # in a checkpoint each expert's matrix is an entry of its own
        prefix, matrix = name.rsplit(".", 1)
        parts = {
            f"{prefix}.{e}.{matrix}.weight": weights[name].dtype for e in range(len(weights[name]))
        }
        found[name] = torch.stack(list(stored.read(parts).values()))
    model.load_state_dict(found)


def shares(attn: Attention, x_TD: Tensor, positions: Positions) -> dict[str, tuple[float, float]]:
    """Mass kept, and mass of all entries, by way of choosing, over the queries that count."""
    assert attn.compressor is not None and attn.indexer is not None
    q_TQ = attn.q_norm(attn.wq_a(x_TD))
    q_THK = attn.wq_b(q_TQ).unflatten(-1, (-1, attn.dim))
    kv_TK = rotate(attn.kv_norm(attn.wkv(x_TD)), positions.rotation("csa"))
    entries_CK = attn.compressor(x_TD, positions, LocalExchange())
    attention = AttentionInputs(
        q_THK,
        kv_TK,
        entries_CK,
        attn.attn_sink,
        positions.query_rotation("csa"),
        positions.query_ranges("csa"),
        window=attn.window,
        norm_eps=attn.eps,
    )
    _, lse2 = attention_with_lse2(attention)
    mass = attention_probability_mass(attention, lse2)
    mass_TC = mass(slice(0, len(x_TD)), slice(0, len(entries_CK)))
    index = attn.indexer(x_TD, q_TQ, positions, LocalExchange())
    scores_TC = naive_scores(index.q_TIJ, index.keys_CJ, index.weights_TI)
    ranges = positions.ranges("csa")
    entry = torch.arange(len(entries_CK))
    seen_TC = (entry >= ranges.entry_start_T[:, None]) & (entry < ranges.entry_end_T[:, None])
    counted = (seen_TC.sum(1) >= LEAST) & ~positions.layout.padding_T
    quarter_T = seen_TC.sum(1) // 4
    generator = torch.Generator().manual_seed(0)
    ways = {
        "indexer": scores_TC,
        "most mass": mass_TC,
        "at random": torch.rand(scores_TC.shape, generator=generator),
    }
    real = ~positions.layout.padding_T
    sink_TH = torch.exp2(attn.attn_sink * math.log2(math.e) - lse2)
    attended_T = (1.0 - sink_TH).sum(1)  # by all heads, to window and entries
    found = {}
    for name, values in ways.items():
        rank = values.masked_fill(~seen_TC, -torch.inf).argsort(1, descending=True).argsort(1)
        kept_TC = mass_TC * (rank < quarter_T[:, None])
        found[name] = (float(kept_TC[counted].sum()), float(mass_TC[counted].sum()))
        kept_TC = mass_TC * (rank < attn.indexer.topk)
        found[f"{name}, top-k"] = (float(kept_TC[real].sum()), float(mass_TC[real].sum()))
        lost_T = (mass_TC - kept_TC).sum(1)
        found[f"{name}, all"] = (
            float((attended_T - lost_T)[real].sum()),
            float(attended_T[real].sum()),
        )
    return found


@torch.no_grad()
def recall(config: RunConfig, model: V4Model, steps: int) -> dict[int, dict[str, float]]:
    """The share that each way of choosing keeps, by layer, over validation rows."""
    sums: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    inside: list[tuple[int, Tensor, Positions]] = []
    hooks = [
        attn.register_forward_pre_hook(
            lambda _, inputs, row=row: inside.append((row, inputs[0], inputs[1]))
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
            for row, x_TD, positions in inside:
                for name, (kept, whole) in shares(model.attentions()[row], x_TD, positions).items():
                    sums[row][name][0] += kept
                    sums[row][name][1] += whole
            inside.clear()
    for hook in hooks:
        hook.remove()
    return {
        row: {name: kept / whole for name, (kept, whole) in ways.items()}
        for row, ways in sums.items()
    }


@torch.no_grad()
def sharpen(model: V4Model, factor: float) -> None:
    """Larger entries: the same attention over them, less even."""
    for attn in model.attentions().values():
        if attn.indexer is not None and attn.compressor is not None:
            attn.compressor.norm.weight.mul_(factor)


def warm_up(engine: NativeEngine, loader: Loader, steps: int, rate: float) -> None:
    """Train the indexers alone, on rows of the loader's."""
    engine.set_attention("warmup")
    for step in range(steps):
        losses = engine.forward_backward(loader.at(200 + step))
        engine.step(rate, engine.gradient_norm())
        print(f"warm-up, step {step + 1}: {float(losses.indexer):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=32, help="validation rows")
    parser.add_argument("--sharpen", type=float, help="factor of the entries' norms")
    parser.add_argument("--steps", type=int, default=50, help="of a warm-up here")
    parser.add_argument("--rate", type=float, default=1e-2, help="its learning rate")
    options = parser.parse_args()
    config, grid = load_run(options.run).alone(), Grid.single(torch.device("cpu"))
    warmup = next(s for s in config.recipe.phases if s.attention == "warmup")
    saved = {step_of(path): path for path in checkpoints_in(config.run_dir / "checkpoints")}
    before = max(step for step in saved if step <= warmup.first)
    after = max(step for step in saved if warmup.first < step <= warmup.end)
    local, optimizer = build(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    validation = Validation(config, grid, options.rows)
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
    titles = {
        "a quarter of what a query sees": "",
        "index_topk": ", top-k",
        "index_topk, the window included": ", all",
    }
    for title, end in titles.items():
        print(f"| layer, {title} | untrained | after the warm-up | most mass | at random |")
        print("|---:|---:|---:|---:|---:|")
        for row, ways in trained.items():
            columns = [ways[name + end] for name in ("indexer", "most mass", "at random")]
            columns.insert(0, untrained[row]["indexer" + end])
            print(f"| {row} | " + " | ".join(f"{share:.1%}" for share in columns) + " |")


if __name__ == "__main__":
    main()
