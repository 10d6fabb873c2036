"""Checkpoints: names, atomic publishing, damage, other models, a full disk."""

import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

from tests.distributed import spawn
from tests.full_disk import full_disk
from tests.trainer.tiny import assert_same_run, column, saved_tensors, steps_in_file, train
from trainer.checkpoint import layout
from trainer.checkpoint.folder import CheckpointFolder, checkpoints_in
from trainer.checkpoint.logical_tensors import TensorBox
from trainer.parallel.grid import Degrees, Grid
from trainer.process.errors import CheckpointError, SaveError


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4."""
    run_dir = tmp_path_factory.mktemp("trained")
    train(tiny, run_dir, "steps=4", "checkpoint.every=2")
    return run_dir


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def weights_of(run_dir: Path) -> Path:
    (file,) = (run_dir / "checkpoints/step-00000004").glob("*.safetensors")
    return file


def test_whole_tensors_under_official_names(trained: Path) -> None:
    saved = saved_tensors(trained / "checkpoints/step-00000004")
    assert saved["layers.0.ffn.experts.3.w1.weight"].shape == (16, 24)
    assert saved["optim.momentum.layers.0.ffn.experts.3.w1.weight"].shape == (16, 24)
    assert saved["optim.exp_avg_sq.embed.weight"].shape == (400, 24)
    assert saved["layers.1.ffn.gate.bias"].abs().max() > 0
    assert saved["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    state = json.loads((trained / "checkpoints/step-00000004/state.json").read_text())
    assert (state["step"], state["seed"], state["model"]["hidden_size"]) == (4, 3, 24)
    assert state["tokens"] == column(trained, "tokens")[-1] > 0


def test_no_pickle_is_read(tiny: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.suffix for path in (copy / "checkpoints/step-00000004").iterdir()}
    assert names == {".safetensors", ".json"}

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    train(tiny, copy, "steps=5")
    assert steps_in_file(copy) == [1, 2, 3, 4, 5]


def damage(run_dir: Path, kind: str) -> str:
    """Damage the newest checkpoint; returns the file that the message should name."""
    weights = weights_of(run_dir)
    if kind == "truncated":
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size - 1)
    elif kind == "altered":
        with weights.open("r+b") as file:
            file.seek(-5, 2)
            byte = file.read(1)[0]
            file.seek(-5, 2)
            file.write(bytes([byte ^ 1]))
    elif kind == "missing":
        weights.unlink()
    elif kind == "added":
        shutil.copy(weights, weights.with_name("other.safetensors"))
        return "other.safetensors"
    elif kind == "state":
        state = weights.with_name("state.json")
        state.write_text(state.read_text().replace('"step": 4', '"step": 5'))
        return "state.json"
    else:
        manifest = weights.with_name("manifest.json")
        text = manifest.read_text()
        broken = text[:50] if kind == "manifest" else text.replace('"size": ', '"size": 1')
        manifest.write_text(broken)
        return "manifest.json"
    return weights.name


@pytest.mark.parametrize(
    "kind", ["truncated", "altered", "missing", "added", "state", "manifest", "manifest sizes"]
)
def test_a_damaged_checkpoint_names_the_previous_one(tiny: Path, copy: Path, kind: str) -> None:
    file = damage(copy, kind)
    with pytest.raises(CheckpointError) as caught:
        train(tiny, copy, "steps=5")
    text = str(caught.value)
    assert "step-00000004 is damaged" in text and file in text
    assert f"previous complete checkpoint is {copy / 'checkpoints/step-00000002'}" in text
    assert steps_in_file(copy) == [1, 2, 3, 4], "nothing was touched"


def test_doing_what_the_message_says_resumes(tiny: Path, copy: Path, trained: Path) -> None:
    damage(copy, "truncated")
    shutil.rmtree(copy / "checkpoints/step-00000004")
    train(tiny, copy, "steps=4")
    assert_same_run(trained, copy, 4)


def test_all_damaged(tiny: Path, copy: Path) -> None:
    damage(copy, "altered")
    (copy / "checkpoints/step-00000002/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint before it"):
        train(tiny, copy, "steps=5")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.hidden_size=32", r"model\.hidden_size is 24 there and 32"),
        ("model.index_topk=3", r"model\.index_topk is 4 there and 3"),
        ("seed=7", "trained with seed = 3, .* seed = 7"),
        ("steps=3", "beyond steps = 3"),
    ],
)
def test_a_checkpoint_of_another_run(tiny: Path, copy: Path, override: str, field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        train(tiny, copy, "steps=5", override)


def test_a_loss_weight_may_change(tiny: Path, copy: Path) -> None:
    train(tiny, copy, "steps=5", "model.balance_loss_weight=0.5")
    assert steps_in_file(copy)[-1] == 5


def test_a_save_takes_memory_for_a_file_and_not_for_all(tmp_path: Path, monkeypatch) -> None:
    """Of 72 MiB in 16 parts, one larger than a file, no more than twice the largest file."""
    mib = 2**20
    monkeypatch.setattr(layout, "FILE_BYTES", 8 * mib)
    halves = [TensorBox(torch.rand(mib), (2 * mib,), (start,)) for start in (0, mib)]
    tensors = {f"t{n}": torch.rand(mib) for n in range(13)}
    tensors |= {"split": halves, "large": torch.rand(3 * mib)}
    folder = CheckpointFolder(tmp_path, Grid.single(torch.device("cpu")))
    tracemalloc.start()
    path = folder.save(1, tensors, {})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= 2 * 12 * mib + mib
    sizes = sorted(file.stat().st_size // mib for file in path.glob("*.safetensors"))
    assert sizes == [4, *[8] * 7, 12]
    loaded = {name: torch.zeros_like(t) for name, t in tensors.items() if name != "split"}
    loaded["split"] = torch.zeros(2 * mib)
    folder.load(path, loaded)
    tensors["split"] = torch.cat([half.tensor for half in halves])
    for name, tensor in loaded.items():
        assert torch.equal(tensor, tensors[name]), name


def test_only_the_newest_are_kept(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "steps=5", "checkpoint.every=1", "checkpoint.keep=2")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]


def test_a_full_disk_loses_nothing(tiny: Path, copy: Path) -> None:
    before = saved_tensors(copy / "checkpoints/step-00000004")
    with full_disk(50_000), pytest.raises(SaveError) as caught:
        train(tiny, copy, "steps=6", "checkpoint.every=1")
    text = str(caught.value)
    assert "step-00000006: the checkpoint could not be written: File too large" in text
    assert f"newest complete one is {copy / 'checkpoints/step-00000004'}" in text
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"], "no temporary folder stays"
    after = saved_tensors(copy / "checkpoints/step-00000004")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert steps_in_file(copy) == [1, 2, 3, 4, 5, 6], "training resumed after the failure at 5"


def save_where_one_rank_has_no_room(rank: int, world_size: int, folder: Path) -> str:
    grid = Grid.build(Degrees(world_size), torch.device("cpu"))
    checkpoints = CheckpointFolder(folder, grid)
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(8)}
    checkpoints.save(1, tensors, {"step": 1})
    try:
        with full_disk(2_000 if rank == 1 else 10**9):
            checkpoints.save(2, tensors, {"step": 2})
    except SaveError as error:
        failed = str(error)
    checkpoints.save(3, tensors, {"step": 3})
    for tensor in tensors.values():
        tensor.zero_()
    checkpoints.load(folder / "step-00000003", tensors)
    assert [int(tensor[-1]) for tensor in tensors.values()] == list(range(8))
    return failed


def test_one_full_disk_stops_the_save_on_all_ranks(tmp_path: Path) -> None:
    texts = spawn(save_where_one_rank_has_no_room, 2, tmp_path)
    assert texts[0] == texts[1] and "step-00000002" in texts[0]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000001", "step-00000003"]
    assert not list(tmp_path.glob(".*"))
