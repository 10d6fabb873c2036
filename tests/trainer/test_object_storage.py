"""Whole runs whose checkpoints, shards, tokenizer and exports are in object storage."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from data.storage import StoragePath, as_path
from tests.s3 import S3Server
from tests.trainer.tiny import column
from trainer.checkpoint.folder import checkpoints_in
from trainer.checkpoint.reader import CheckpointReader
from trainer.commands import main
from trainer.config import load_config
from trainer.metrics.jsonl import read_metrics

ROOT = Path(__file__).parents[2]


def upload(folder: Path, target: StoragePath) -> None:
    """Copies a folder as `aws s3 cp --recursive` does."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (target / path.relative_to(folder).as_posix()).upload(path)


def launch(*arguments: str) -> subprocess.Popen[str]:
    """`v4 train` in another process."""
    command = [sys.executable, "-m", "launch", "train", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def weights_of(folder: StoragePath | Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / f"step-{step:08d}")
    return reader.read(dict.fromkeys(reader.shapes, torch.float64))


@pytest.fixture(scope="module")
def bucket(s3: S3Server, tiny: Path) -> StoragePath:
    """A bucket with the shards and the tokenizer of the tiny run."""
    bucket = StoragePath(s3.make_bucket("training"))
    config = load_config(tiny)
    upload(Path(config.data.shards), bucket / "shards")
    upload(Path(config.data.tokenizer.path), bucket / "tokenizer")
    return bucket


@pytest.mark.slow
def test_a_run_in_object_storage(
    bucket: StoragePath, s3: S3Server, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed and resumed on two ranks, to the bit; pruned, evaluated, verified, exported, imported.

    Shards and tokenizer come from there as well, the shards through a cache.
    """
    common = ["steps=6", "checkpoint={every: 2, keep: 2}", "evaluation.every=3"]
    finish(launch(str(tiny), f"run_dir={tmp_path / 'disk'}", *common, "--nproc-per-node=2"))

    run, folder = tmp_path / "run", bucket / "one"
    arguments = [str(tiny), f"run_dir={run}", *common, f"checkpoint.folder={folder}"]
    arguments += [f"data.shards={bucket / 'shards'}", f"data.tokenizer.path={bucket / 'tokenizer'}"]
    arguments += [f"data.cache.folder={tmp_path / 'cache'}", "--nproc-per-node=2"]
    s3.set_faults(
        {"method": "PUT", "path": "safetensors", "status": 503, "times": 2},
        {"method": "GET", "path": "list-type.*one", "frozen": True, "times": 10**6},
        # The save of step 4 is killed before it is published.
        {"method": "PUT", "path": "step-00000004/manifest", "status": 503, "times": 10**6},
    )
    process = launch(*arguments)
    deadline = time.monotonic() + 150
    while not any(re.search("step-00000004/.*state.json", one) for one in s3.requests()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    kill_all(process)
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000002"]
    s3.set_faults()

    output = finish(launch(*arguments))
    assert f"resumed from {folder}/step-00000002" in output
    for name in ("loss", "lm_loss", "grad_norm", "tokens"):
        assert column(run, name) == column(tmp_path / "disk", name), name
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000004", "step-00000006"]
    ours, theirs = weights_of(folder, 6), weights_of(tmp_path / "disk/checkpoints", 6)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert f"{run}: complete, with 6 of 6 steps" in finish(launch(*arguments))
    written = "".join(one.read_text() for one in run.glob("*.yaml")) + output
    assert "testing-id" not in written and "testing-secret" not in written

    capfd.readouterr()
    assert main(["eval", str(run)]) == main(["report", str(run)]) == 0
    evaluated = next(one for one in capfd.readouterr().out.splitlines() if one.startswith("{"))
    last = read_metrics(run / "metrics.jsonl")[-1]["validation_loss"]
    assert json.loads(evaluated)["validation_loss"] == pytest.approx(last, rel=1e-5)
    out = bucket / "hf"
    assert main(["export", str(run), str(out)]) == 0
    assert main(["export", str(tmp_path / "disk"), str(tmp_path / "hf")]) == 0
    for path in (tmp_path / "hf").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert set(out.names()) == {path.name for path in (tmp_path / "hf").iterdir()}
    assert main(["export", str(run), str(out)]) == 2, "it is not empty"
    imported = [str(tiny), str(out), f"run_dir={tmp_path / 'new'}"]
    assert main(["import", *imported, f"checkpoint.folder={bucket / 'two'}"]) == 0
    embedding = "embed.weight"
    assert torch.equal(weights_of(bucket / "two", 0)[embedding], ours[embedding])

    name = flip_a_byte(folder / "step-00000006")
    capfd.readouterr()
    assert main(["eval", str(run)]) == 2
    assert f"step-00000006 is damaged: {name} was altered" in capfd.readouterr().err


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kills the launcher, torchrun and the ranks."""
    launcher = psutil.Process(process.pid)
    for one in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def flip_a_byte(checkpoint: StoragePath) -> str:
    """Changes one byte of a file; returns its name."""
    name = next(name for name in checkpoint.names() if name.endswith(".safetensors"))
    content = bytearray((checkpoint / name).read_bytes())
    content[-3] ^= 1
    (checkpoint / name).write(bytes(content))
    return name


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "checkpoint.folder=s3://no-such-bucket/run",
            "checkpoint.folder = s3://no-such-bucket/run: the bucket does not exist; create it",
        ),
        ("data.shards=s3://no-such-bucket/x", "s3://no-such-bucket"),
        ("checkpoint.folder=s3://", "checkpoint.folder: should name a bucket"),
        ("run_dir=s3://bucket/run", "run_dir: should be a folder on a file system"),
        ("checkpoint.folder=s3://someone:hunter2@bucket/run", "should be a URL without user name"),
        ("data.tokenizer.path=s3://a:hunter2@bucket/run", "should be a URL without user name"),
        ("checkpoint.folder=nothing://bucket/run", "nothing:// is no storage that fsspec knows"),
        ("checkpoint.folder=gs://bucket/run", "pip install 'v4-pretrain[gcs]'"),
    ],
)
def test_bad_input_is_one_sentence(
    s3: S3Server,
    tiny: Path,
    tmp_path: Path,
    override: str,
    sentence: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from trainer.__main__ import main as train

    s3.set_faults()
    assert train([str(tiny), f"run_dir={tmp_path / 'run'}", override]) == 2
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("v4: error: ")]
    assert sentence in line and "hunter2" not in error and "Traceback" not in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_bucket_that_refuses(
    s3: S3Server, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainer.__main__ import main as train

    folder = f"{s3.make_bucket('refusing')}/run"
    s3.set_faults({"method": "PUT", "path": "refusing", "status": 403, "times": 99})
    assert train([str(tiny), f"run_dir={tmp_path}", f"checkpoint.folder={folder}"]) == 2
    assert re.search(rf"error: cannot write {folder}/lease.json: access", capfd.readouterr().err)
    s3.set_faults({"method": "GET", "path": "refusing", "status": 403, "times": 99})
    assert train([str(tiny), f"run_dir={tmp_path}", f"checkpoint.folder={folder}"]) == 2
    assert f"checkpoint.folder = {folder}: access was refused" in capfd.readouterr().err


def test_without_credentials(
    s3: S3Server,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import sys; from trainer.__main__ import main; sys.exit(main(sys.argv[1:]))"
    folder = f"{s3.make_bucket('closed')}/run"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [str(tiny), f"run_dir={tmp_path / 'run'}", f"checkpoint.folder={folder}"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "no credentials" in result.stderr and result.stderr.count("\n") == 1


def test_two_runs_in_one_folder(
    s3: S3Server, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from data.lease import Lease
    from trainer.__main__ import main as train

    s3.set_faults()
    folder = f"{s3.make_bucket('shared')}/run"
    one, two = tmp_path / "one", tmp_path / "two"
    with Lease(as_path(folder), "v4 train"):
        assert train([str(tiny), f"run_dir={one}", f"checkpoint.folder={folder}"]) == 2
    error = capfd.readouterr().err
    assert re.search(rf"{folder}: `v4 train` \(process \d+ on .*\) has been working here", error)
    assert train([str(tiny), f"run_dir={one}", "steps=1", f"checkpoint.folder={folder}"]) == 0
    capfd.readouterr()
    assert train([str(tiny), f"run_dir={two}", "steps=2", f"checkpoint.folder={folder}"]) == 2
    assert f"{folder} is where {one} keeps its checkpoints" in capfd.readouterr().err
