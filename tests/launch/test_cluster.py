"""Cluster files, and what `v4 plan --cluster` and `v4 sweep --cluster` write for Slurm."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.cluster import CONFIGS, load_cluster, write_job
from launch.job import ClusterConfig, Nodes
from tests.launch.jobs import DEBUG, HARD, check_script, torchrun_options, write
from tests.launch.sweeps import GRID
from tests.launch.sweeps import write as write_sweep
from trainer.config import ConfigError, load_config

SLURM = "kind: slurm\nslurm: {}\n"


def refused(tmp_path: Path, text: str, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message and "abc" not in message
    for part in parts:
        assert part in message


def directives(script: str) -> dict[str, str]:
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, flags=re.M)
    assert len(options) == script.count("#SBATCH")
    return dict(options)


def test_the_sbatch_script(tmp_path: Path) -> None:
    path = write(tmp_path, SLURM + "save_seconds: 120\n", 4, 2, *HARD)
    assert path == tmp_path / "train.sbatch"
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    check_script(text)
    asked = directives(text)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("4", "1", "2")
    assert asked["signal"] == "B:TERM@180" and "requeue" in asked and "exclusive" in asked
    assert asked["time"] == "24:00:00" and "partition" not in asked
    options = torchrun_options(text)
    assert (options["--nnodes"], options["--nproc-per-node"]) == ("4", "2")
    assert options["--rdzv-backend"] == "c10d" and options["--max-restarts"] == "3"
    assert options["--shutdown-timeout"] == "120"
    line = next(line for line in text.splitlines() if line.startswith("arguments="))
    assert shlex.split(line.removeprefix("arguments=(")[:-1]) == [str(DEBUG), *HARD, "device=cuda"]
    assert not list(tmp_path.glob(".train*"))


def test_a_job_of_as_many_nodes_as_there_are(tmp_path: Path) -> None:
    """Slurm chooses the number at every start; the run fits each of them."""
    text = write(tmp_path, SLURM, "2:4").read_text()
    check_script(text)
    asked = directives(text)
    assert asked["nodes"] == "2-4" and "ntasks-per-node" not in asked  # else Slurm gives 2
    assert re.search(r"\nsrun .*\\\n    --ntasks-per-node=1 \\\n", text)
    assert torchrun_options(text)["--nnodes"] == "$SLURM_JOB_NUM_NODES"
    with pytest.raises(ConfigError, match=r"^3 of --nodes 2:4: .* 3 processes"):
        write(tmp_path, SLURM, "2:4", 1, "parallel.tensor=2")
    for wrong in ("4:2", "0", "2:"):
        with pytest.raises(ConfigError, match=f"^--nodes = {wrong} should be a number of"):
            write(tmp_path, SLURM, wrong)


def node_shell(tmp_path: Path, python: str) -> subprocess.Popen[str]:
    """Starts what a node runs, in a session as the processes of a step, with this `python`."""
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/bash\n{python}\n")
    stub.chmod(0o755)
    text = write(tmp_path, f"python: {stub}\n{SLURM}", 2, 0).read_text()
    node = text.split("node='\n", 1)[1].split("\n'\n", 1)[0]
    return subprocess.Popen(
        ["bash", "-c", node, "node"],
        env={**os.environ, "SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "V4_HEAD": "localhost"},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def test_a_node_goes_on_after_the_signal_for_a_profile(tmp_path: Path) -> None:
    """Slurm sends it to all processes of the step."""
    python = "trap 'echo profile; done=yes' USR1; echo begins"
    python += "; while [[ -z $done ]]; do sleep 0.1; done; sleep 1; exit 7"
    with node_shell(tmp_path, python) as node:
        assert node.stdout is not None and node.stdout.readline() == "begins\n"
        os.killpg(node.pid, signal.SIGUSR1)
        assert node.stdout.readline() == "profile\n"
        assert node.wait(60) == 7


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_saves_is_requeued_unless_the_disk_is_full(tmp_path: Path, code: int) -> None:
    """The batch shell, with programs in place of Slurm's and of the nodes."""
    programs = {
        "scontrol": 'echo "scontrol $*" | tee -a calls',
        "squeue": "echo v4",
        "scancel": "touch asked",
        "srun": f"touch begins; until [[ -f asked ]]; do sleep 0.1; done; sleep 1; exit {code}",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = write(tmp_path, f"folder: {tmp_path}\n{SLURM}", 2, 0, f"run_dir={tmp_path}/run")
    search = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"PATH": search, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]"}
    with subprocess.Popen(["bash", path], env={**os.environ, **slurm}) as batch:
        while not (tmp_path / "begins").exists():
            assert batch.poll() is None
            time.sleep(0.05)
        batch.terminate()
        assert batch.wait(60) == code
    was_requeued = "scontrol requeue 5\n" in (tmp_path / "calls").read_text()
    assert was_requeued == (code == 0)


def test_slurm_settings(tmp_path: Path) -> None:
    text = write(
        tmp_path,
        "kind: slurm\ngpus: false\nslurm: {partition: p, account: a, qos: q, time: 2-00:00:00, "
        "cpus_per_node: 9, exclusive: false, options: ['--constraint=ib'], container: img.sqsh, "
        "container_mounts: ['/a:/b'], setup: ['module load cuda']}\n",
    ).read_text()
    options = directives(text)
    expected = {"partition": "p", "account": "a", "qos": "q", "time": "2-00:00:00"}
    assert options | expected == options
    assert text.count("--cpus-per-task=9") == 2  # srun does not take the job's
    assert options["constraint"] == "ib" and "exclusive" not in options
    assert "gpus-per-node" not in options and "device=cpu)" in text
    assert "--container-image=img.sqsh" in text and "--container-mounts=/a:/b" in text
    assert "\nmodule load cuda\n" in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kind: slurm\nslurm: {partion: x}\n", ("'slurm.partion'", "'slurm.partition'")),
        ("kind: slurm\nslurm: {}\nmax_restart: 3\n", ("'max_restart'", "'max_restarts'")),
        ("kind: slurm\nslurm: {}\npartition: x\n", ("'partition'", "'slurm.partition'")),
        ("kind: slurn\nslurm: {}\n", ("kind = 'slurn'", "'slurm'")),
        ("kind: slurm\n", ("needs the section slurm",)),
        (SLURM + "kubernetes: {image: x, claim: w, mount: /w}\n", ("no section kubernetes",)),
        ("kind: slurm\nslurm: {time: soon}\n", ("slurm.time = 'soon'",)),
        ('kind: slurm\nslurm: {partition: "x\\n#SBATCH"}\n', ("slurm.partition",)),
        (SLURM + "environment: {WANDB_API_KEY: abc}\n", ("WANDB_API_KEY", "secret")),
        (SLURM + "environment: {https_proxy: 'http://me:abc@proxy'}\n", ("https_proxy", "an @")),
        (SLURM + "environment: {NVIDIA_TF32_OVERRIDE: '1'}\n", ("NVIDIA_TF32_OVERRIDE",)),
        (SLURM + "port: 80\n", ("port = 80", "1024")),
    ],
)
def test_a_mistake_is_one_clear_sentence(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    refused(tmp_path, text, *parts)
    assert not (tmp_path / "train.sbatch").exists()


def test_the_shipped_files_are_read(tmp_path: Path) -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {path.stem for path in files} == {"slurm", "kubernetes"}
    run = load_config(DEBUG)
    for path in files:
        cluster = load_cluster(path.stem)
        assert isinstance(cluster, ClusterConfig) and cluster.kind == path.stem
        assert write_job(run, [str(DEBUG)], cluster, Nodes(2, 2), 1, tmp_path / path.stem).is_file()


def test_a_job_for_cpus(tmp_path: Path) -> None:
    """`--gpus-per-node 0`: one process on each node, whose `device` is not auto."""
    text = write(tmp_path, SLURM, 3, 0).read_text()
    assert "gpus" not in text and "device=cpu)" in text
    assert torchrun_options(text)["--nproc-per-node"] == "1"
    with pytest.raises(ConfigError, match="device = cuda needs GPUs, and the job has none"):
        write(tmp_path, SLURM, 3, 0, "device=cuda")


def test_a_job_whose_folders_are_in_object_storage(tmp_path: Path) -> None:
    """The script looks for no such folder on the node."""
    overrides = ["checkpoint.folder=s3://bucket/run", "data.shards=s3://bucket/shards"]
    text = write(tmp_path, SLURM, 2, 2, *overrides).read_text()
    assert "[[ -n $stopping && $code != 2 ]]" in text and " -d " not in text
    assert " -d " in write(tmp_path, SLURM, 2, 2).read_text()
    check_script(text)


def v4(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["v4", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("agent", [None, "me/mine/abc12345"])
def test_the_jobs_of_a_sweep(
    tiny: Path,
    tmp_path: Path,
    agent: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An array of jobs with a GPU each, which run `v4 sweep`, or wandb's agents."""
    settings = tmp_path / "cluster.yaml"
    settings.write_text(f"kind: slurm\nfolder: {tmp_path}\npython: bin/python\nslurm: {{}}\n")
    file, out = str(write_sweep(tiny, tmp_path, GRID)), tmp_path / "out"
    sweep = ["sweep", file, "--out", out, "--jobs=4", "--seed=7", "--cluster", settings]
    sweep += [] if agent is None else ["--wandb-agent", agent]
    assert v4(*sweep, monkeypatch=monkeypatch) == 0
    assert f"submit it with: sbatch {out}/sweep.sbatch" in capfd.readouterr().out
    text = (out / "sweep.sbatch").read_text()
    assert "[[ -n $stopping && $code != 2 ]]" in text, "a full disk is not tried again"
    check_script(text)
    asked = directives(text)
    assert (asked["array"], asked["gpus-per-node"]) == ("0-3", "1") and "exclusive" not in asked
    command = '-m wandb agent --forward-signals --term-timeout 300 "$@"'
    arguments = f"arguments=({agent})"
    if agent is None:
        command = '-m launch sweep --call "$SLURM_ARRAY_JOB_ID" "$@"'
        arguments = f"arguments=({file} --out={out} --seed=7)"
        assert (out / "study.journal").is_file()  # so that no job has to make it
    assert f"\nbin/python {command} &\n" in text and arguments in text
    assert f'export PATH={tmp_path}/bin:"$PATH"\n' in text  # wandb's agent starts `python`
    settings.write_text("kind: kubernetes\nkubernetes: {image: x, claim: w, mount: /w}\n")
    assert v4(*sweep, monkeypatch=monkeypatch) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "kind = kubernetes: a sweep is an array of Slurm's" in error


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    job = ["plan", DEBUG, "steps=5", "--cluster", "slurm", "--nodes", 2, "--out", out]
    assert v4(*job, "--gpus-per-node", 3, monkeypatch=monkeypatch) == 0
    output = capfd.readouterr().out
    assert f"submit it with: sbatch {out}/train.sbatch" in output
    assert re.search(r"processes\W+6\b", output)
    assert f"arguments=({DEBUG} steps=5 device=cuda)" in (out / "train.sbatch").read_text()
    edited = (out / "train.sbatch").read_text() + "# edited by hand\n"
    (out / "train.sbatch").write_text(edited)
    for copies in (1, 1):  # the same job once more keeps nothing
        assert v4(*job, "--gpus-per-node", 3, monkeypatch=monkeypatch) == 0
        assert (out / "train.sbatch.1").read_text() == edited
        assert len(list(out.iterdir())) == 1 + copies
    assert v4(*job, "--gpus-per-node", 0, monkeypatch=monkeypatch) == 0
    assert re.search(r"processes\W+2\b", capfd.readouterr().out)
    (out / "train.sbatch").unlink()
    assert v4(*job, "--gpus-per-node", 5, monkeypatch=monkeypatch) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "data.global_batch_size = 8" in error and "10" in error
    assert not (out / "train.sbatch").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert v4(*job[:-2], "--out=~/job", "--gpus-per-node=1", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "home/job/train.sbatch").is_file()
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert v4(*job[:-1], blocked, "--gpus-per-node=1", monkeypatch=monkeypatch) == 2
    assert f"cannot write {blocked}" in capfd.readouterr().err
