"""Export from checkpoints whose tensors are split, on several processes, shard by shard."""

import filecmp
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainer.export.hf_folder
from data import Tokenizer
from data.text import read_prompts
from data.text.chat_template import chat_template
from model import V4Model
from model.hf import to_official
from tests.distributed import spawn
from tests.full_disk import full_disk
from tests.trainer.checkpoint.test_topologies import checkpoint_of, whole_run
from tests.trainer.tiny import saved_tensors, train
from trainer.commands import main
from trainer.config import RunConfig, load_config
from trainer.export.export import export_run
from trainer.export.hf_folder import read_hf_weights
from trainer.parallel.grid import Degrees, Grid
from trainer.process.errors import CheckpointError, ExportError
from trainer.state import TrainState

SHARD_BYTES = 20_000
SPLIT = Degrees(2, tensor=2, expert_tensor=2)


def config_of(path: Path, run_dir: Path) -> RunConfig:
    return load_config(path, [f"run_dir={run_dir}", "precision=bf16"])


def watch_files(written: list[str]) -> None:
    """Append the names of the files that this process writes."""
    save_file = trainer.export.hf_folder.save_file

    def recording(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append(path.name)
        save_file(tensors, path, metadata)

    trainer.export.hf_folder.save_file = recording


def save_and_export(rank: int, world_size: int, path: Path, folder: Path) -> tuple[list[str], str]:
    """Save at a split topology, export together; then again while one rank's disk is full."""
    config = config_of(path, folder / "run")
    tokenizer = Tokenizer(config.data.tokenizer.path).hash
    checkpoint_of(config, config.run_dir, SPLIT, rank, tokenizer)[0].save(TrainState(3, 30))
    grid = Grid.build(Degrees(2), torch.device("cpu"))
    written: list[str] = []
    watch_files(written)
    export_run(config, folder / "two", grid, SHARD_BYTES)
    files = list(written)
    with full_disk(15_000 if rank == 1 else 10**9), pytest.raises(ExportError) as caught:
        export_run(config, folder / "failed", grid, SHARD_BYTES)
    return files, str(caught.value)


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint two ranks have split and exported, and the export by one process."""
    folder = tmp_path_factory.mktemp("export")
    (first, text), (second, same_text) = spawn(save_and_export, 2, tiny, folder)
    assert text == same_text and "failed: cannot be written: " in text and "large" in text
    assert sorted(path.name for path in folder.iterdir()) == ["run", "two"], "nothing is left"
    assert len(first) >= len(second) >= 4 and not set(first) & set(second)
    export_run(config_of(tiny, folder / "run"), folder / "one", shard_bytes=SHARD_BYTES)
    return folder


def test_who_reads_the_folder_reads_its_files(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in (folder / "one").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes


def test_prompt_texts_of_the_chat_template(folder: Path, tiny: Path, tmp_path: Path) -> None:
    template = (folder / "one/chat_template.jinja").read_text()
    assert template == chat_template()
    encoder = tmp_path / "encoder.py"
    encoder.write_text(
        'TOOLS_TEMPLATE = "{dsml_token}{tool_schemas}"\n'
        'response_format_template = "As {schema}"\nREASONING_EFFORT_MAX = "Think."\n'
    )
    arguments = ["export", str(tiny), str(tmp_path / "out"), f"run_dir={folder / 'run'}"]
    arguments += ["precision=bf16"]
    assert main([*arguments, f"--prompts={encoder}"]) == 0
    expected = chat_template(read_prompts(encoder))
    assert (tmp_path / "out/chat_template.jinja").read_text() == expected != template
    assert main([*arguments, f"--prompts={tmp_path / 'none.py'}"]) == 2


def test_two_processes_write_what_one_writes(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "one").iterdir())
    assert names == sorted(path.name for path in (folder / "two").iterdir())
    assert filecmp.cmpfiles(folder / "one", folder / "two", names, shallow=False)[0] == names


def test_split_tensors_are_whole_again_in_the_runs_precision(folder: Path, tiny: Path) -> None:
    run = whole_run(config_of(tiny, folder))
    exported = read_hf_weights(folder / "two")
    expected = {
        official: part
        for name, tensor in run.tensors.items()
        for official, part in to_official(
            [(name, run.by_key.get(f"master.{name}", tensor).to(tensor.dtype))]
        )
    }
    index = json.loads((folder / "two/model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], tensor), name
    dtypes = {tensor.dtype for tensor in exported.values()}
    assert dtypes == {torch.bfloat16, torch.float32, torch.int64}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trained_run(tiny: Path, tmp_path: Path, precision: str) -> None:
    config = train(tiny, tmp_path / "run", "steps=2", f"precision={precision}")
    export_run(config, tmp_path / "hf")
    exported = read_hf_weights(tmp_path / "hf")
    saved = saved_tensors(tmp_path / "run/checkpoints/step-00000002")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    like = dict(to_official(V4Model(config.model, dtype).state_dict().items()))
    assert exported.keys() == like.keys()
    for name, tensor in like.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], saved[name].to(tensor.dtype)), name
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def live_bytes() -> int:
    """Memory of all tensors of this process that are not on the meta device."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_no_more_than_a_shard_is_in_memory(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = trainer.export.hf_folder.save_file
    peaks, sizes = [], []

    def measured(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        peaks.append(live_bytes() - before)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(trainer.export.hf_folder, "save_file", measured)
    gc.collect()
    before = live_bytes()
    export_run(config_of(tiny, folder / "run"), tmp_path / "hf", shard_bytes=SHARD_BYTES)
    assert sum(sizes) > 5 * SHARD_BYTES
    assert all(size <= peak < size + 2_000 for size, peak in zip(sizes, peaks, strict=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=32", r"model\.hidden_size is 24 there and 32"),
        ("model.n_routed_experts=3", r"model\.n_routed_experts is 4 there and 3"),
        ("seed=9", "trained with seed = 3, .* seed = 9"),
    ],
)
def test_a_checkpoint_of_another_run(
    folder: Path, tiny: Path, tmp_path: Path, override: str, message: str
) -> None:
    config = load_config(tiny, [f"run_dir={folder / 'run'}", override])
    with pytest.raises(CheckpointError, match=message):
        export_run(config, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_link_and_the_working_directory_are_written_into(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("disk", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.chdir(tmp_path / "here")
    for out, real in ((str(tmp_path / "link"), "disk"), (".", "here")):
        assert main(["export", str(tiny), out, f"run_dir={folder / 'run'}", "precision=bf16"]) == 0
        assert (tmp_path / real / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "here", "link"]


@pytest.mark.slow
def test_torchrun(folder: Path, tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "trainer.commands", "export", str(tiny)]
    command += [str(tmp_path / "hf"), f"run_dir={folder / 'run'}", "precision=bf16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"wrote step 3 of {folder / 'run'} to {tmp_path / 'hf'}; the run has not trained "
        "its indexers (attention = select), and transformers selects entries with them\n"
    )
    exported = read_hf_weights(tmp_path / "hf")
    one = read_hf_weights(folder / "one")
    assert exported.keys() == one.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in one.items())
