"""One step at any topology, for rows and routings that are hard to divide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from data import Batch
from model import IGNORE_INDEX, ModelConfig
from model.parameters import official_name, parameter_table
from optim import HybridZero, OptimConfig, build_table
from tests.distributed import spawn
from tests.model.tiny import gradient_scale, tiny_config
from trainer.checkpoint.logical_tensors import TensorBox, boxes_of
from trainer.engine import NativeEngine
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.parallel.optimizer_sharding import build_hybrid_zero
from trainer.parallel.plan import LocalModel, build_local_model
from trainer.parallel.stage_plan import embedding_is_replicated, plan_stages

ROW = 48
NUDGE = 2**-22
"""Relative change of the weights that shows how ill-conditioned a gradient is: 4 roundings."""
CONFIG = tiny_config(
    vocab_size=96, o_groups=4, moe_intermediate_size=32, layer_types=("csa", "csa", "hca", "window")
)
# Runs of 6 to 24 tokens, a window of 8, windows of 4 and 16 tokens to compress.
LAYOUTS: dict[str, list[list[int]]] = {
    "single tokens": [[1] * ROW, [ROW]],
    "short samples at the borders": [[5, 2, 4, 3, 9, 1, 11, 13], [11, 2, 11, 1, 23]],
    "samples across all ranks": [[47, 1], [1, 47]],
    "borders of samples and ranks fall together": [[12, 12, 12, 12], [24, 24]],
    # Windows of 16 that end with the first token of a run of 12 begin two ranks before.
    "windows over three ranks": [[9, 39], [21, 27]],
    "padding on some ranks only": [[7], [25, 3]],
    "a row that only fills up": [[], [30, 10]],
    "turns that are not predicted": [[5, 27, 16], [31, 9]],
    "a row without a target": [[48], [20, 28]],
}
# Positions of each row whose targets are not the assistant's; the first row of the last has no
# target at all.
TURNS = {
    "turns that are not predicted": [[*range(3), *range(9, 24), 31, 40], [*range(12), 30, 33]],
    "a row without a target": [[*range(48)], [*range(19)]],
}
# Which experts the tokens of all layers are made to choose: "even" leaves it to the router.
ROUTINGS: dict[str, list[int]] = {"even": [], "first": [0, 1, 2], "last": [7, 6, 5]}
CASES = [(layout, "even") for layout in LAYOUTS] + [
    ("short samples at the borders", "first"),
    ("padding on some ranks only", "last"),
]
TOPOLOGIES: dict[int, list[dict[str, int]]] = {
    2: [{}, {"tensor": 2}, {"context": 2}, {"expert": 2}, {"expert_tensor": 2}, {"pipeline": 2}],
    4: [
        {"context": 4},
        {"tensor": 4},
        {"tensor": 2, "expert": 4},
        {"tensor": 2, "context": 2, "expert": 2, "expert_tensor": 2},
        {"context": 2, "pipeline": 2, "expert": 2},
    ],
}
Result = tuple[list[float], dict[str, list[TensorBox]]]


def batches_of(layout: str, rank: int, ranks: int) -> list[Batch]:
    """The data rank's rows, one a microbatch; with one data rank, all of them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, CONFIG.vocab_size, (2, ROW), generator=generator)
    targets = tokens.roll(-1, 1)
    for row, lengths in enumerate(LAYOUTS[layout]):
        end = 0
        for length in lengths:
            end += length
            targets[row, end - 1] = IGNORE_INDEX
        targets[row, end:] = IGNORE_INDEX
        targets[row, TURNS.get(layout, [[], []])[row]] = IGNORE_INDEX
    rows = range(rank * 2 // ranks, (rank + 1) * 2 // ranks)
    return [
        Batch(tokens[row : row + 1], targets[row : row + 1], [LAYOUTS[layout][row]]) for row in rows
    ]


def force_routing(model: Any, experts: list[int]) -> None:
    """Let every token choose these, by hash tables and biases, which are no parameters."""
    for gate in model.routers().values():
        if experts and gate.hashed:
            gate.tid2eid[:] = torch.tensor(experts)[: gate.tid2eid.shape[1]]
        elif experts:
            gate.bias[experts] = 100.0


@torch.no_grad()
def leave_special_values(local: LocalModel) -> None:
    """Initial norms, sinks and stream coefficients are such that some gradients nearly vanish."""
    for name, parameter in local.model.named_parameters():
        if name.endswith((".scale", ".base", "ape", "attn_sink", "norm.weight")):
            generator = torch.Generator().manual_seed(crc32(official_name(name).encode()) + 1)
            noise = torch.randn(local.placements[name].global_shape, generator=generator)
            parameter += 0.5 * local.placements[name].shard(noise)


@torch.no_grad()
def nudge(local: LocalModel, seed: int) -> None:
    """Changes every weight by up to NUDGE of its size; seed 0 changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in local.model.parameters() if seed else ():
        noise = torch.rand(parameter.shape, generator=generator)
        parameter *= 1 + NUDGE * (2 * noise - 1)


def step(config: ModelConfig, grid: Grid, case: tuple[str, str], seed: int = 0) -> Result:
    """Losses, and every parameter's gradient with where it lies in the whole.

    `seed` is that of `nudge`.
    """
    schedule = "1f1b"
    stages = plan_stages(config, ROW, grid.pipeline.size, schedule, 1)
    local = build_local_model(config, torch.float32, grid, stages)
    local.model.to_empty(device="cpu")
    local.model.init_weights(seed=5, shards=local.placements)
    leave_special_values(local)
    nudge(local, seed)
    force_routing(local.model, ROUTINGS[case[1]])
    optimizer = zero_of(config, local, grid)
    engine = NativeEngine(local, grid, optimizer)
    out = engine.forward_backward(batches_of(case[0], grid.data.rank, grid.data.size))
    norm = engine.gradient_norm()
    losses = [float(x) for x in (out.loss, out.lm, out.mtp, out.balance, norm)]
    losses += out.expert_load.flatten().tolist()
    return losses, gradients_of(optimizer, local)


def gradients_of(optimizer: HybridZero, local: LocalModel) -> dict[str, list[TensorBox]]:
    """What this rank owns of the summed gradients, by name of the whole."""
    gradients: dict[str, list[TensorBox]] = {}
    for piece in optimizer.gradients():
        for name, part in boxes_of(piece, local.placements[piece.name]):
            copy = TensorBox(part.tensor.clone(), part.shape, part.offset)
            gradients.setdefault(name, []).append(copy)
    return gradients


def limits_of(
    reference: dict[str, Tensor], nudged: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """How far each gradient may be from the reference.

    Sums in another order: 1e-7 of some fifty terms of the largest's size. Where a sum of terms of
    both signs nearly vanishes, rounding is larger than that: by how much shows the change of the
    same sum with weights that are a few roundings away. The worst seen is 0.6 of the limit, over
    two draws of the special values; half the limits are below 1.1e-5 of the largest element, 90%
    below 1.5e-5, and the highest, of the scale of a stream's coefficients, is 1.8e-4.
    """
    return {
        name: 5e-6 * gradient_scale(name, reference)
        + 2 * max(float((other[name] - whole).abs().max()) for other in nudged)
        for name, whole in reference.items()
    }


def covered_by(
    parts: dict[str, list[TensorBox]], reference: dict[str, Tensor], limits: dict[str, float]
) -> dict[str, int]:
    """Elements by name, after all were compared with the whole gradients."""
    covered = {}
    for name, some in parts.items():
        for mine in some:
            assert mine.shape == tuple(reference[name].shape)
            spans = zip(mine.offset, mine.tensor.shape, strict=True)
            part = reference[name][tuple(slice(a, a + n) for a, n in spans)]
            assert float((mine.tensor - part).abs().max()) <= limits[name], name
            covered[name] = covered.get(name, 0) + part.numel()
    return covered


def zero_of(config: ModelConfig, local: LocalModel, grid: Grid) -> HybridZero:
    """The optimizer, with chunks so short that many go out during backward."""
    parameters = dict(local.model.named_parameters())
    shapes = {name: local.placements[name].table_shape for name in parameters}
    table = build_table(shapes, parameter_table(config), OptimConfig())
    is_replicated = embedding_is_replicated(local.stages, config.num_nextn_predict_layers)
    return build_hybrid_zero(
        parameters, local.placements, table, OptimConfig(), grid, is_replicated, chunk_elements=3000
    )


def whole_of(parts: dict[str, list[TensorBox]]) -> dict[str, Tensor]:
    """Whole tensors out of all their parts."""
    gradients = {}
    for name, some in parts.items():
        gradients[name] = torch.full(some[0].shape, torch.nan)
        for part in some:
            spans = zip(part.offset, part.tensor.shape, strict=True)
            gradients[name][tuple(slice(a, a + n) for a, n in spans)] = part.tensor
        assert gradients[name].isfinite().all(), name
    return gradients


def run_all(rank: int, world: int) -> list[list[Result]]:
    """Worker: every case at every topology of this many ranks."""
    return [
        [step(CONFIG, Grid.build(Degrees(world, **degrees), torch.device("cpu")), c) for c in CASES]
        for degrees in TOPOLOGIES[world]
    ]


def run_alone(seed: int = 0) -> list[Result]:
    return [step(CONFIG, Grid.single(torch.device("cpu")), case, seed) for case in CASES]


@pytest.fixture(scope="module")
def alone() -> list[Result]:
    return run_alone()


@pytest.fixture(scope="module")
def limits(alone: list[Result]) -> list[dict[str, float]]:
    """Those of every case."""
    nudged = [run_alone(1), run_alone(2)]
    return [
        limits_of(whole_of(whole), [whole_of(results[case][1]) for results in nudged])
        for case, (_, whole) in enumerate(alone)
    ]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_those_of_one_rank(
    alone: list[Result], limits: list[dict[str, float]], world: int
) -> None:
    by_rank = spawn(run_all, world, timeout=280)
    for topology, degrees in enumerate(TOPOLOGIES[world]):
        for number, case in enumerate(CASES):
            losses, whole = alone[number]
            reference = whole_of(whole)
            covered = dict.fromkeys(reference, 0)
            for results in by_rank:
                theirs, parts = results[topology][number]
                assert theirs == pytest.approx(losses, rel=2e-6), (degrees, case)
                for name, count in covered_by(parts, reference, limits[number]).items():
                    covered[name] += count
            for name, count in covered.items():
                copies = 2 if name == "embed.weight" and degrees.get("pipeline") == 2 else 1
                assert count == copies * reference[name].numel(), (degrees, name)


def test_the_forced_routings_leave_a_rank_with_nothing(alone: list[Result]) -> None:
    """Not a test of the product: the cases above are what they say."""
    blocks, experts = CONFIG.num_hidden_layers + 1, CONFIG.n_routed_experts
    for number, used in ((-2, range(3)), (-1, range(5, 8))):
        load = torch.tensor(alone[number][0][5:]).view(blocks, experts)
        idle = [e for e in range(experts) if e not in used]
        assert load[:, idle].sum() == 0 and load.sum() > 0
