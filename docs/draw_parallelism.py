"""Draws the pictures of parallelism.md: python -m docs.draw_parallelism [folder].

Whatever the code computes is not drawn by hand: places come from `coordinates_of`, windows from
`SampleLayout`, bytes from `step_traffic`, schedules from torch.
"""

from __future__ import annotations

import math
import random
import re
import sys
from pathlib import Path
from typing import Any, Literal

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from docs.drawing import (
    BLUE,
    FOUR,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    SKY,
    arrow,
    bare,
    blank,
    cell,
    save,
)
from docs.timeline import timeline
from model import SampleLayout
from trainer.config import ParallelConfig, load_config
from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates_of
from trainer.planning import Work, step_traffic

ROOT = Path(__file__).parents[1]


# --- places of the ranks ------------------------------------------------------------------------


def draw_ranks(folder: Path) -> None:
    """Draws both divisions of the same 16 ranks, and the peers of one rank."""
    degrees = Degrees(16, tensor=2, context=2, pipeline=2, expert=4)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.9), gridspec_kw={"wspace": 0.04})
    dense = "tensor 2 x context 2 x data 2 x pipeline 2"
    experts = "expert 4 x expert_data 2 x pipeline 2"
    for ax, names, color_by, title in (
        (axes[0], DENSE_AXES, "tensor", f"dense weights: {dense}"),
        (axes[1], EXPERT_AXES[1:], "expert", f"routed experts: {experts}"),
    ):
        bare(ax, 9.5, 8.1)
        ax.set_title(title, loc="left", fontweight="bold", fontsize=10.5)
        for rank in range(16):
            draw_rank(ax, rank, coordinates_of(rank, names, degrees), color_by)
        for stage in range(2):
            ax.text(0, 1.05 + 2 * stage, f"pipeline\n{stage}", va="center", fontsize=9.5)
        draw_groups(ax, names, degrees, 5)
    axes[0].text(
        1.3, 4.25, "one colour: the same part of split weights", fontsize=9, color="#555555"
    )
    axes[1].text(
        1.3, 4.25, "one colour: the same quarter of the experts", fontsize=9, color="#555555"
    )
    save(figure, folder, "ranks")


def draw_rank(ax: Any, rank: int, place: dict[str, int], color_by: str) -> None:
    """Draws one rank's square with its coordinates; stages from top to bottom."""
    x, y = 1.3 + rank % 8, 0.15 + 2 * place["pipeline"]
    cell(ax, x, y, 1, 1.8, FOUR[place[color_by]])
    ax.text(x + 0.5, y + 0.45, rank, ha="center", va="center", fontsize=14, fontweight="bold")
    lines = [f"{name.replace('expert_data', 'replica')} {n}" for name, n in place.items()][:-1]
    ax.text(x + 0.5, y + 1.2, "\n".join(lines), ha="center", va="center", fontsize=7)


def draw_groups(ax: Any, names: tuple[str, ...], degrees: Degrees, rank: int) -> None:
    """Draws a line of 16 ranks for each axis, with the peers of `rank` on it filled."""
    center = coordinates_of(rank, names, degrees)
    ax.text(0, 5.15, f"peers of rank {rank}, by axis", fontsize=9.5, fontweight="bold")
    for line, name in enumerate(names):
        y = 5.75 + 0.62 * line
        ax.text(2.55, y, name, ha="right", va="center", fontsize=9)
        for other in range(16):
            place = coordinates_of(other, names, degrees)
            same = all(place[n] == center[n] for n in names if n != name)
            x = 3.0 + 0.4 * other
            color = ORANGE if other == rank else BLUE if same else PALE
            ax.add_patch(Rectangle((x - 0.17, y - 0.24), 0.34, 0.48, fc=color))
            ink = "white" if same else GREY
            ax.text(x, y + 0.01, other, ha="center", va="center", fontsize=7.5, color=ink)


# --- tensor -------------------------------------------------------------------------------------

Box = tuple[float, float, float, str, str]


def draw_tensor(folder: Path) -> None:
    """Draws one block on one of t tensor ranks: two lanes, and the collectives between them."""
    figure, ax = blank(12.5, 5.6, 25, 11.2)
    cell(ax, 0, 0.4, 25, 4.9, "#F4F8FB", ec="none")
    cell(ax, 0, 6.9, 25, 3.1, "#FDF5EC", ec="none")
    ax.text(0.2, 0.95, "the rank's tokens: 1/t of the run, all features", fontweight="bold")
    ax.text(0.2, 9.75, "all tokens of the t ranks: 1/t of heads, groups, inner dims")
    ax.texts[-1].set_fontweight("bold")
    whole: list[Box] = [
        (0.2, 2.9, 2.3, "residual\nstreams", "whole"),
        (3.1, 2.9, 2.4, "read,\nnorm", "whole"),
        (6.1, 1.5, 3.2, "wq_a, wkv,\ncompressor,\nindexer", "whole"),
        (12.4, 2.9, 2.2, "write\nstreams", "whole"),
        (15.2, 2.9, 2.2, "read,\nnorm", "whole"),
        (18.0, 1.5, 3.0, "router,\nrouted\nexperts", "whole"),
        (22.4, 2.9, 2.4, "sum,\nwrite\nstreams", "whole"),
    ]
    split: list[Box] = [
        (6.2, 7.1, 1.9, "wq_b\nheads", "split"),
        (8.5, 7.1, 2.1, "attention\nheads", "split"),
        (11.0, 7.1, 1.9, "wo_a\ngroups", "split"),
        (13.3, 7.1, 1.9, "wo_b\ncolumns", "split"),
        (16.2, 7.1, 2.2, "shared\nw1, w3", "split"),
        (22.5, 7.1, 2.2, "shared\nw2", "split"),
    ]
    for box in whole + split:
        draw_box(ax, *box)
    for y, pairs in ((3.8, [(2.5, 3.1), (14.6, 15.2)]), (8.0, [(8.1, 8.5), (10.6, 11.0)])):
        for a, b in pairs:
            arrow(ax, (a, y), (b, y))
    arrow(ax, (12.9, 8.0), (13.3, 8.0))
    arrow(ax, (18.4, 8.0), (22.5, 8.0))
    arrow(ax, (5.5, 3.4), (6.1, 2.7))
    arrow(ax, (17.4, 3.4), (18.0, 2.7))
    arrow(ax, (21.0, 2.7), (22.4, 3.4))
    between(ax, 7.2, (3.3, 7.1), "gather\nqueries [Q], keys [K],\nselected entries [k]")
    between(ax, 13.9, (7.1, 4.7), "reduce-\nscatter [D]")
    between(ax, 16.9, (4.7, 7.1), "gather [D]")
    between(ax, 23.5, (7.1, 4.7), "reduce-\nscatter [D]", ha="right")
    ax.text(
        0.2,
        10.85,
        "Backward reverses the arrows: a gather becomes a reduce-scatter, a reduce-scatter a "
        "gather. Whole weights and streams are never sent.",
        fontsize=9,
        color="#555555",
    )
    save(figure, folder, "tensor")


def draw_box(ax: Any, x: float, y: float, w: float, text: str, kind: str) -> None:
    """Draws a part of the block: whole on every rank, or split."""
    color = {"whole": FOUR[0], "split": FOUR[1]}[kind]
    shape = "round,pad=0,rounding_size=0.2"
    ax.add_patch(FancyBboxPatch((x, y), w, 1.8, boxstyle=shape, fc=color, ec="none"))
    ax.text(x + w / 2, y + 0.9, text, ha="center", va="center", fontsize=9)


def between(
    ax: Any, x: float, ends: tuple[float, float], text: str, ha: Literal["left", "right"] = "left"
) -> None:
    """Draws a collective between the lanes, from one height to another."""
    arrow(ax, (x, ends[0]), (x, ends[1]), color=GREEN, lw=2.2, mutation_scale=15)
    style = {"va": "center", "fontsize": 9, "color": "#00664B", "fontweight": "bold"}
    ax.text(x + (0.25 if ha == "left" else -0.25), 6.1, text, ha=ha, **style)


# --- expert -------------------------------------------------------------------------------------


def draw_expert(folder: Path) -> None:
    """Draws rows on their way to the ranks of their experts and back."""
    ranks, per_rank, active = 4, 4, 2
    generator = random.Random(3)
    pairs = [
        (rank, token, expert)
        for rank in range(ranks)
        for token in range(per_rank)
        for expert in generator.sample(range(2 * ranks), active)
    ]
    figure, ax = blank(12.5, 5.1, 25, 10.2)
    titles = (
        (0.2, "tokens"),
        (4.0, "a row per token and expert"),
        (12.6, "at the experts' ranks"),
        (22.2, "sums"),
    )
    for x, title in titles:
        ax.text(x, 0.5, title, fontweight="bold")
    ax.text(9.4, 0.5, "all to all", color="#00664B", fontweight="bold")
    ax.text(19.3, 0.5, "and back", color="#00664B", fontweight="bold")
    for rank in range(ranks):
        y = 1.1 + 2.3 * rank
        draw_tokens(ax, 0.2, y, rank, per_rank)
        sent = sorted((p for p in pairs if p[0] == rank), key=lambda p: (p[2] // 2, p[1]))
        received = sorted((p for p in pairs if p[2] // 2 == rank), key=lambda p: (p[2], p[0], p[1]))
        for rows, x0 in ((sent, 4.0), (received, 12.6)):
            for place, (_, _, expert) in enumerate(rows):
                x = x0 + 0.62 * place
                cell(ax, x, y, 0.58, 1.1, FOUR[expert // 2])
                ax.text(x + 0.29, y + 0.55, f"e{expert}", ha="center", va="center", fontsize=8)
        ax.text(12.6, y + 1.5, f"rank {rank}: experts {2 * rank}, {2 * rank + 1}", fontsize=8.5)
        draw_tokens(ax, 22.2, y, rank, per_rank)
        arrow(ax, (2.9, y + 0.55), (3.8, y + 0.55))
    draw_flows(ax, pairs, ranks)
    save(figure, folder, "expert")


def draw_flows(ax: Any, pairs: list[tuple[int, int, int]], ranks: int) -> None:
    """Draws a ribbon between every two ranks, as wide as the rows sent, and back."""
    for source in range(ranks):
        for target in range(ranks):
            rows = sum(pair[0] == source and pair[2] // 2 == target for pair in pairs)
            start = 1.25 + 2.3 * source + 0.27 * target
            end = 1.25 + 2.3 * target + 0.27 * source
            style = {"color": FOUR[target], "lw": 1.3 * rows, "solid_capstyle": "butt"}
            ax.plot([9.2, 9.6, 12.0, 12.4], [start, start, end, end], **style)
            ax.plot([19.1, 19.5, 21.6, 22.0], [end, end, start, start], **style)


def draw_tokens(ax: Any, x: float, y: float, rank: int, count: int) -> None:
    """Draws the tokens of a rank."""
    for token in range(count):
        cell(ax, x + 0.62 * token, y, 0.58, 1.1, "#CFCFCF")
        ax.text(x + 0.62 * token + 0.29, y + 0.55, f"t{token}", ha="center", va="center", size=8)
    ax.text(x, y + 1.5, f"rank {rank}", fontsize=8.5)


# --- context ------------------------------------------------------------------------------------

RUN_RANKS, RATIO, SAMPLES = 4, 4, (13, 22, 13)


def draw_context(folder: Path) -> None:
    """Draws a row of three samples over four ranks: halos, windows, entries, the gather."""
    row = sum(SAMPLES)
    run = row // RUN_RANKS
    entries = SampleLayout.from_lengths([list(SAMPLES)]).entries(RATIO)
    first = entries.host_first_token_C.tolist()
    owner = [(start + RATIO - 1) // run for start in first]
    shares = [[c for c, rank in enumerate(owner) if rank == r] for r in range(RUN_RANKS)]
    figure, ax = blank(12.5, 5.9, 62, 29.5)
    left = 13

    def label(y: float, text: str) -> None:
        ax.text(0, y, text, va="center", fontsize=9.5)

    label(1.6, "the row: three samples")
    start = 0
    for number, length in enumerate(SAMPLES):
        cell(ax, left + start, 0.6, length, 2, "#D9D9D9", lw=2.5)
        ax.text(left + start + length / 2, 1.6, f"sample {number}", ha="center", va="center")
        start += length
    label(5, "one run of tokens a rank")
    for token in range(row):
        cell(ax, left + token, 5.3, 1, 0.9, FOUR[token // run], lw=0.8)
    for rank in range(RUN_RANKS):
        cell(ax, left + rank * run, 4, run, 1.4, FOUR[rank], ec="none")
        ax.text(left + rank * run + run / 2, 4.8, f"rank {rank}", ha="center", va="center")
    halo = RATIO - 1
    label(9.7, f"1  halo: the {halo} tokens\n    before the run (hatched)")
    for rank in range(RUN_RANKS):
        y = 7.3 + 1.2 * rank
        cell(ax, left + rank * run, y, run, 1.05, FOUR[rank])
        if rank:
            sender = FOUR[rank - 1]
            cell(ax, left + rank * run - halo, y, halo, 1.05, sender, hatch="////", ec=INK, lw=0.5)
    label(15, "2  pool the windows\n    that end in the run")
    for entry, token in enumerate(first):
        cell(ax, left + token + 0.08, 14, RATIO - 0.16, 2, FOUR[owner[entry]])
        ax.text(left + token + RATIO / 2, 15, entry, ha="center", va="center", fontsize=9)
    draw_gather(ax, left, run, shares, owner, label)
    for boundary in range(1, RUN_RANKS):
        x = left + boundary * run
        ax.plot([x, x], [6.2, 16.4], color=GREY, lw=0.8, ls=":", zorder=0)
    save(figure, folder, "context")


def draw_gather(
    ax: Any, left: float, run: int, shares: list[list[int]], owner: list[int], label: Any
) -> None:
    """Draws the local entries with padding, and all entries in the order of samples."""
    longest = max(map(len, shares))
    width = 2.6
    label(20, f"3  pad to the maximum\n    of any rank, {longest}")
    label(26, "4  gather, and sort by\n    sample")
    shift = left + (run * RUN_RANKS - len(owner) * width) / 2
    for rank, share in enumerate(shares):
        x0 = left + rank * run + (run - longest * width) / 2
        for place in range(longest):
            x = x0 + place * width
            if place >= len(share):
                cell(ax, x, 19, width - 0.2, 2, "white", ec=GREY, ls="--")
                continue
            cell(ax, x, 19, width - 0.2, 2, FOUR[rank])
            ax.text(x + width / 2 - 0.1, 20, share[place], ha="center", va="center", fontsize=9)
            end = shift + share[place] * width + width / 2 - 0.1
            ax.plot([x + width / 2 - 0.1, end], [21.1, 24.9], color=FOUR[rank], lw=1.4)
    for entry, rank in enumerate(owner):
        cell(ax, shift + entry * width, 25, width - 0.2, 2, FOUR[rank])
        x = shift + entry * width + width / 2 - 0.1
        ax.text(x, 26, entry, ha="center", va="center", fontsize=9)
    ax.text(
        left,
        28.9,
        "Windows restart with every sample; tokens left at a sample's end make no entry.",
        fontsize=9,
        color="#555555",
    )


# --- pipeline -----------------------------------------------------------------------------------


def draw_pipeline(folder: Path) -> None:
    """Draws four schedules on four ranks with eight microbatches."""
    ranks, micro = 4, 8
    schedules = (
        ("1F1B", 1, "1f1b: one stage a rank"),
        ("Interleaved1F1B", 2, "interleaved_1f1b: two stages a rank, in a loop"),
        ("ZBVZeroBubble", 2, "zero_bubble_v: two stages a rank, down and back up"),
        ("DualPipeV", 2, "dual_pipe_v: the same V, forward and backward in pairs"),
    )
    lines = [timeline(name, ranks, micro, chunks) for name, chunks, _ in schedules]
    ends = [max(slot[0] + slot[1] for line in one for slot in line) for one in lines]
    figure, axes = plt.subplots(4, 1, figsize=(12.5, 9.2))
    colors = {"F": SKY, "I": "#E69F00", "W": GREEN}
    for ax, one, end, (_, chunks, title) in zip(axes, lines, ends, schedules, strict=True):
        bare(ax, max(ends) + 0.1, ranks)
        idle = 1 - 3 * micro / end
        ax.set_title(f"{title}; {end:g} units, {idle:.0%} idle", loc="left", fontsize=10.5)
        for rank, slots in enumerate(one):
            ax.text(-0.2, rank + 0.5, f"rank {rank}", ha="right", va="center", fontsize=9)
            cell(ax, 0, rank + 0.06, max(ends), 0.88, "#F3F3F3", ec="none")
            for begin, length, kind, stage, number in slots:
                second = chunks == 2 and stage >= ranks
                edge = {"ec": "white", "lw": 0.7}
                cell(ax, begin, rank + 0.06, length, 0.88, colors[kind], **edge)
                if second:
                    cell(ax, begin, rank + 0.82, length, 0.12, INK, ec="none")
                x = begin + length / 2
                ax.text(x, rank + 0.47, number, ha="center", va="center", fontsize=7.5)
    names = ("forward", "backward of inputs", "backward of weights")
    handles: list[Any] = [
        Patch(color=c, label=n) for c, n in zip(colors.values(), names, strict=True)
    ]
    handles.append(Patch(color="#F3F3F3", label="idle"))
    handles.append(Patch(color=INK, label="dark edge: the rank's second stage"))
    figure.legend(handles=handles, ncols=5, loc="lower center", frameon=False)
    figure.subplots_adjust(left=0.055, right=0.99, top=0.965, bottom=0.06, hspace=0.28)
    save(figure, folder, "pipeline", tight=False)


# --- traffic ------------------------------------------------------------------------------------

# Axes as `step_traffic` names them, without the numbers of owners and of replicas.
AXES = {
    "expert": ("expert_all_to_all",),
    "pipeline": ("pipeline",),
    "tensor": ("tensor",),
    "context, sequence": ("context", "sequence"),
    "update, dense": ("stage", "tensor_replicas", "embedding", "trivial"),
    "update, experts": ("expert_data", "expert_tensor"),
    "world": ("world",),
}
WORLD = 512
TOPOLOGIES: tuple[dict[str, Any], ...] = (
    {"pipeline": 8, "expert": 32},
    {"pipeline": 8, "expert": 32, "context": 2},
    {"pipeline": 8, "expert": 32, "tensor": 2},
)


def draw_traffic(folder: Path) -> None:
    """Draws the bytes that a rank of a middle stage sends in one step of flash.yaml."""
    config = load_config(ROOT / "configs" / "flash.yaml")
    data = config.data
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), sharey=True)
    for ax, topology in zip(axes, TOPOLOGIES, strict=True):
        parallel = ParallelConfig(pipeline_schedule="dual_pipe_v", **topology)
        degrees = parallel.degrees(WORLD)
        stages = parallel.stages(config.model, data.seq_len)
        micro = data.global_batch_size // degrees.data // data.micro_batch_size
        work = Work.whole_rows(data.seq_len, data.micro_batch_size, micro)
        sent = step_traffic(config.model, degrees, stages, WORLD // 2, work, config.optim)
        totals = [
            sum(size for (axis, _), size in sent.items() if re.split("[/*]", axis)[0] in axes_)
            / 1e9
            for axes_ in AXES.values()
        ]
        assert math.isclose(sum(totals), sum(sent.values()) / 1e9), "an axis has another name"
        ax.barh(list(AXES), totals, color=BLUE, height=0.62)
        ax.invert_yaxis() if ax is axes[0] else None
        for line, total in enumerate(totals):
            text = f"{total:,.0f}" if total >= 10 else f"{total:.1f}" if total else "–"
            text = "< 0.001" if 0 < total < 0.001 else text
            ax.text(total + 20, line, text, va="center", fontsize=9.5)
        ax.set(xlim=(0, 1700), xticks=range(0, 1501, 500), xlabel="GB sent by one rank in one step")
        title = " x ".join(f"{name} {n}" for name, n in topology.items())
        ax.set_title(f"{title} x data {degrees.data}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(left=False)
    rows = f"{data.global_batch_size:,} rows of {data.seq_len:,} tokens"
    title = (
        f"flash.yaml on {WORLD} ranks, {rows} a step, {config.precision}; a rank of a middle stage"
    )
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.tight_layout()
    save(figure, folder, "traffic", tight=False)


def main() -> None:
    """Draws all pictures into the folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (
        draw_ranks,
        draw_tensor,
        draw_expert,
        draw_context,
        draw_pipeline,
        draw_traffic,
    ):
        draw(folder)


if __name__ == "__main__":
    main()
