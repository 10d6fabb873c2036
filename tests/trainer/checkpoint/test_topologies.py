"""Checkpoints written at one topology and read at another, every tensor bit for bit."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from model import V4Model
from model.hf import to_official
from model.parameters import parameter_table
from optim import OptimConfig, StateSlice, build_table
from tests.distributed import spawn
from tests.trainer.tiny import saved_tensors
from trainer.checkpoint import dcp_planners
from trainer.checkpoint.dcp_planners import BoxLoadPlanner
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.logical_tensors import STEP, TensorBox
from trainer.checkpoint.run import RunCheckpoint
from trainer.config import RunConfig, load_config
from trainer.parallel.degrees import Degrees, coordinates_of
from trainer.parallel.grid import Grid
from trainer.parallel.optimizer_sharding import build_hybrid_zero
from trainer.parallel.placement import Placement, placements_of
from trainer.process.errors import CheckpointError
from trainer.state import TrainState

STATES = ("momentum", "exp_avg", "exp_avg_sq", "step", "master")
ONE = {"one": Degrees(1)}
TWO = {
    "data 2": Degrees(2),
    "tensor 2": Degrees(2, tensor=2),
    "expert 2": Degrees(2, expert=2),
    "expert_tensor 2": Degrees(2, expert_tensor=2),
    "tensor 2, expert 2 inside": Degrees(2, tensor=2, expert=2),
    "pipeline 2": Degrees(2, pipeline=2),
}
FOUR = {
    "tensor 2, expert 2": Degrees(4, tensor=2, expert=2),
    "expert_tensor 4": Degrees(4, expert_tensor=4),
    "expert 2, expert_tensor 2": Degrees(4, expert=2, expert_tensor=2),
    "tensor 2, expert_tensor 2, pipeline 2": Degrees(4, tensor=2, expert_tensor=2, pipeline=2),
}
EVERY = ONE | TWO | FOUR


class RunTensors:
    """Stands in for a rank's model and its optimizer: tensors by name, nothing else."""

    def __init__(self, tensors: dict[str, Tensor], states: dict[str, Tensor]) -> None:
        self.tensors, self.by_key = tensors, states
        self.step_count = 7

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        trained = {key.partition(".")[2] for key in self.by_key}
        return [(name, tensor) for name, tensor in self.tensors.items() if name in trained]

    def states(self) -> Iterator[StateSlice]:
        for key, tensor in self.by_key.items():
            kind, _, name = key.partition(".")
            yield StateSlice(kind, name, tensor)

    def restored(self) -> None:
        pass


def whole_run(config: RunConfig) -> RunTensors:
    """All tensors of a run in bf16, each with different values."""
    model = V4Model(config.model, torch.bfloat16)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    placements = placements_of(shapes, Degrees(1), 0)
    table = build_table(shapes, parameter_table(config.model), OptimConfig())
    optimizer = build_hybrid_zero(parameters, placements, table, OptimConfig(), Grid.single())
    states = {}
    for piece in optimizer.states():
        tensor = piece.tensor if piece.kind == STEP else piece.tensor.view(shapes[piece.name])
        states[f"{piece.kind}.{piece.name}"] = distinct(f"{piece.kind}.{piece.name}", tensor)
    return RunTensors({n: distinct(n, t) for n, t in model.state_dict().items()}, states)


def distinct(name: str, like: Tensor) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    values = torch.randint(
        -(2**20), 2**20, like.shape, generator=torch.Generator().manual_seed(seed)
    )
    return values.to(like.dtype)


def stage_of(name: str, stages: int) -> set[int]:
    """The pipeline ranks that hold a tensor: the embedding is on both ends."""
    if name == "embed.weight":
        return {0, stages - 1}
    if name.startswith("layers."):
        return {min(int(name.split(".")[1]), stages - 1)}
    return {stages - 1}


def held_by(
    run: RunTensors, degrees: Degrees, rank: int
) -> tuple[RunTensors, dict[str, Placement]]:
    """Copies of the parts that a rank holds of a whole run."""
    shapes = {name: tuple(tensor.shape) for name, tensor in run.tensors.items()}
    stage = coordinates_of(rank, ("tensor", "context", "data", "pipeline"), degrees)["pipeline"]
    placements = {
        name: placement
        for name, placement in placements_of(shapes, degrees, rank).items()
        if stage in stage_of(name, degrees.pipeline)
    }
    states = {}
    for key, tensor in run.by_key.items():
        state, _, name = key.partition(".")
        if name in placements:
            part = tensor if state == "step" else placements[name].shard(tensor)
            states[key] = part.clone()
    tensors = {name: placements[name].shard(run.tensors[name]).clone() for name in placements}
    return RunTensors(tensors, states), placements


def checkpoint_of(
    config: RunConfig, folder: Path, degrees: Degrees, rank: int, tokenizer: str = "hash"
) -> tuple[RunCheckpoint, RunTensors]:
    grid = Grid.build(degrees, torch.device("cpu"))
    held, placements = held_by(whole_run(config), degrees, rank)
    config = config.model_copy(update={"run_dir": folder})
    checkpoint = RunCheckpoint(config, grid, held, held, tokenizer, placements)  # type: ignore
    return checkpoint, held


class Counting(BoxLoadPlanner):
    """Counts the elements that a load reads."""

    elements = 0

    def finish_plan(self, new_plan):
        Counting.elements = sum(item.lengths.numel() for item in new_plan.items)
        return super().finish_plan(new_plan)


def load_and_compare(config: RunConfig, folder: Path, degrees: Degrees, rank: int) -> None:
    checkpoint, held = checkpoint_of(config, folder, degrees, rank)
    expected = {name: tensor.clone() for name, tensor in (held.tensors | held.by_key).items()}
    for tensor in (held.tensors | held.by_key).values():
        tensor.fill_(-3)
    state = TrainState()
    checkpoint.load(state)
    assert (state.step, state.tokens, held.step_count) == (3, 30, 7)
    for name, tensor in (held.tensors | held.by_key).items():
        if f"master.{name}" not in held.by_key:  # such a weight is rounded from its master
            assert torch.equal(tensor, expected[name]), (folder.name, degrees, name)


def work(
    rank: int, world_size: int, path: Path, folder: Path, save: list[str], load: list[str]
) -> None:
    """Save at every topology of `save`, and load what `load` names at every one of this size."""
    torch.set_num_threads(1)
    config = load_config(path)
    for name in save:
        checkpoint_of(config, folder / name, EVERY[name], rank)[0].save(TrainState(3, 30))
    for at in [degrees for degrees in EVERY.values() if degrees.world_size == world_size]:
        for name in load:
            load_and_compare(config, folder / name, at, rank)


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each topology."""
    folder = tmp_path_factory.mktemp("topologies")
    work(0, 1, tiny, folder, ["one"], [])
    spawn(work, 2, tiny, folder, list(TWO), [])
    spawn(work, 4, tiny, folder, list(FOUR), [])
    assert sorted(path.name for path in folder.iterdir()) == sorted(EVERY)
    return folder


def test_two_ranks_read_what_fewer_and_more_wrote(saved: Path, tiny: Path) -> None:
    spawn(work, 2, tiny, saved, [], ["one", "tensor 2, expert_tensor 2, pipeline 2"])


@pytest.mark.slow
def test_more_ranks_read_what_fewer_wrote(saved: Path, tiny: Path) -> None:
    spawn(work, 4, tiny, saved, [], list(EVERY))


@pytest.mark.slow
def test_fewer_ranks_read_what_more_wrote(saved: Path, tiny: Path) -> None:
    spawn(work, 2, tiny, saved, [], [*TWO, *FOUR])


@pytest.mark.parametrize("name", list(EVERY))
def test_one_process_reads_it(saved: Path, tiny: Path, name: str) -> None:
    work(0, 1, tiny, saved, [], [name])


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints/step-00000003").glob("*.safetensors"))


@pytest.mark.parametrize("name", list(EVERY))
def test_every_element_is_written_once(saved: Path, tiny: Path, name: str) -> None:
    run = whole_run(load_config(tiny))
    expected: Counter[str] = Counter()
    for key, tensor in run.tensors.items():
        expected.update({n: t.numel() for n, t in to_official([(key, tensor)])})
    for key, tensor in run.by_key.items():
        state, _, parameter = key.partition(".")
        if state != "master":
            official = to_official([(parameter, tensor)])
            expected.update({f"optim.{state}.{n}": t.numel() for n, t in official})
    actual: Counter[str] = Counter()
    for path in files_of(saved / name):
        with safe_open(path, framework="pt") as file:
            for entry in file.keys():  # noqa: SIM118
                actual[entry] += file.get_tensor(entry).numel()
    assert actual == expected


@pytest.mark.parametrize("name", ["data 2", "tensor 2", "tensor 2, expert 2"])
def test_the_ranks_share_the_writing(saved: Path, name: str) -> None:
    sizes = [path.stat().st_size for path in files_of(saved / name)]
    assert len(sizes) == EVERY[name].world_size
    assert max(sizes) < 1.1 * min(sizes)


def test_parts_lie_where_their_header_says(saved: Path, tiny: Path) -> None:
    """Read with nothing but safetensors: both halves of a weight that is split along dim 1."""
    whole = whole_run(load_config(tiny)).by_key["master.layers.0.attn.wo_b.weight"]
    name = "layers.0.attn.wo_b.weight"
    shards = {}
    for path in files_of(saved / "tensor 2"):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])[name]["saved_offsets"]
            shards[tuple(offsets)] = file.get_tensor(name)
    assert shards.keys() == {(0, 0), (0, 8)}
    assert torch.equal(torch.cat([shards[0, 0], shards[0, 8]], dim=1), whole)


def test_experts_stand_under_their_global_numbers(saved: Path, tiny: Path) -> None:
    whole = whole_run(load_config(tiny)).by_key["momentum.layers.1.ffn.experts.w2"]
    files = [saved_tensors(path.parent) for path in files_of(saved / "expert 2")[:1]]
    for number in range(4):
        name = f"optim.momentum.layers.1.ffn.experts.{number}.w2.weight"
        assert torch.equal(files[0][name], whole[number])


def elements_read(rank: int, world_size: int, path: Path, folder: Path) -> tuple[int, int]:
    dcp_planners.BoxLoadPlanner = Counting  # type: ignore[misc]
    checkpoint, _ = checkpoint_of(load_config(path), folder, FOUR["tensor 2, expert 2"], rank)
    checkpoint.load(TrainState())
    return Counting.elements, sum(
        p.tensor.numel() for some in checkpoint._tensors().values() for p in some
    )


def test_a_rank_reads_its_parts_and_no_more(saved: Path, tiny: Path) -> None:
    for read, held in spawn(elements_read, 4, tiny, saved / "expert_tensor 4"):
        assert read == held > 10_000


def mistakes(rank: int, world_size: int, folder: Path) -> list[str]:
    """The error of loading when the ranks' parts and the checkpoint disagree."""
    checkpoints = CheckpointFolder(folder, Grid.build(Degrees(2, tensor=2), torch.device("cpu")))
    half = [TensorBox(torch.ones(2, 3), (4, 3), (2 * rank, 0))]
    own = {f"rank {rank}": torch.ones(5)}
    path = checkpoints.save(1, {"split": half, **own}, {})
    checkpoints.load(path, {"split": half, **own})
    texts = []
    for tensors in (
        {"split": half, **own, **({"more": torch.ones(1)} if rank else {})},
        {"split": [TensorBox(torch.ones(3, 3), (6, 3), (3 * rank, 0))], **own},
        {"split": half, **(own if rank else {})},
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load(path, tensors)
        texts.append(str(caught.value).removeprefix(f"{path}: "))
    return texts


def test_all_ranks_report_the_same_of_what_does_not_fit(tmp_path: Path) -> None:
    first, second = spawn(mistakes, 2, tmp_path)
    assert (
        first
        == second
        == [
            "holds no tensor more, which this run needs",
            "split has the shape [4, 3], while this run's model has [6, 3]",
            "holds rank 0, which this run's model does not have",
        ]
    )
