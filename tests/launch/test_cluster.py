"""Jobs for Slurm and Kubernetes: what stands in the files, and the scripts at work."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.cli import main
from launch.cluster import CONFIGS, load_cluster, write_job
from launch.job import ClusterConfig
from tests.distributed import free_port
from tests.trainer.tiny import steps_in_file
from trainer.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs/debug.yaml"
HARD = ["metrics.wandb.tags=['a b', \"it's\", '$(HOME)']", "steps=7"]

SLURM = "kind: slurm\nslurm: {}\n"
KUBERNETES = """
kind: kubernetes
folder: /work
environment: {NCCL_SOCKET_IFNAME: eth0}
kubernetes: {image: registry/x:1, claim: work, mount: /work, memory: '1e3', cpu: "8"}
"""


def write(tmp_path: Path, text: str, nodes: int = 2, gpus: int = 2, *overrides: str) -> Path:
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = load_cluster(str(tmp_path / "cluster.yaml"))
    arguments = [str(DEBUG), *overrides]
    return write_job(load_config(*_split(arguments)), arguments, cluster, nodes, gpus, tmp_path)


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    return arguments[0], arguments[1:]


def refused(tmp_path: Path, text: str, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def directives(script: str) -> dict[str, str]:
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, flags=re.M)
    assert len(options) == script.count("#SBATCH")
    return dict(options)


def torchrun_options(text: str) -> dict[str, str]:
    """Options of torchrun in a script, by name."""
    command = text.split(" -m trainer.process.torchrun", 1)[1].split("-m trainer")[0]
    arguments = command.replace("\\\n", " ").split()
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_the_sbatch_script(tmp_path: Path) -> None:
    path = write(tmp_path, SLURM + "save_seconds: 120\n", 4, 2, *HARD)
    assert path == tmp_path / "train.sbatch"
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
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


def test_slurm_settings(tmp_path: Path) -> None:
    text = write(
        tmp_path,
        "kind: slurm\ngpus: false\nslurm: {partition: p, account: a, qos: q, time: 2-00:00:00, "
        "cpus_per_node: 9, exclusive: false, options: ['--constraint=ib'], container: img.sqsh, "
        "container_mounts: ['/a:/b'], setup: ['module load cuda']}\n",
    ).read_text()
    options = directives(text)
    expected = {"partition": "p", "account": "a", "qos": "q", "time": "2-00:00:00"}
    assert options | expected == options and options["cpus-per-task"] == "9"
    assert options["constraint"] == "ib" and "exclusive" not in options
    assert "gpus-per-node" not in options and "device=cpu)" in text
    assert "--container-image=img.sqsh" in text and "--container-mounts=/a:/b" in text
    assert "\nmodule load cuda\n" in text


def test_the_pytorchjob(tmp_path: Path) -> None:
    path = write(tmp_path, KUBERNETES, 3, 2, *HARD)
    assert path == tmp_path / "pytorchjob.yaml"
    job = yaml.safe_load(path.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"] == {"name": "v4-debug"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {kind: part["replicas"] for kind, part in replicas.items()} == {"Master": 1, "Worker": 2}
    for kind, part in replicas.items():
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch" and container["image"] == "registry/x:1"
        assert pod["terminationGracePeriodSeconds"] > 300
        options = torchrun_options(container["command"][2])
        assert options["--rdzv-endpoint"] == "v4-debug-master-0:29500"
        assert f"is_host={str(kind == 'Master').lower()}" in options["--rdzv-conf"]
        arguments = [arg.replace("$$(", "$(") for arg in container["args"]]
        assert arguments == [str(DEBUG), *HARD, "device=cuda"]
        assert "'$$(HOME)'" in container["args"][1]  # not the pod's variable
        amounts = container["resources"]["limits"]
        assert amounts == {"nvidia.com/gpu": 2, "cpu": "8", "memory": "1e3"}
        variables = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert variables["NCCL_SOCKET_IFNAME"] == "eth0" and "WANDB_API_KEY" not in variables
        done = subprocess.run(["bash", "-n", "-c", container["command"][2]], check=False)
        assert done.returncode == 0
    assert 'memory: "1e3"' in path.read_text()  # a number to readers of YAML 1.2


def test_one_node_has_no_workers_and_secrets_are_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    secret = KUBERNETES.replace("cpu:", "wandb_secret: {name: wandb, key: api-key}, cpu:")
    text = write(tmp_path, secret, 1).read_text()
    replicas = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    (entry,) = (entry for entry in container["env"] if entry["name"] == "WANDB_API_KEY")
    reference = {"name": "wandb", "key": "api-key", "optional": True}
    assert entry == {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": reference}}
    assert "very-secret" not in text
    assert "very-secret" not in write(tmp_path, SLURM).read_text()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kind: slurm\nslurm: {partion: x}\n", ("'slurm.partion'", "'slurm.partition'")),
        ("kind: slurm\nslurm: {}\nmax_restart: 3\n", ("'max_restart'", "'max_restarts'")),
        ("kind: slurm\nslurm: {}\npartition: x\n", ("'partition'", "'slurm.partition'")),
        ("kind: slurn\nslurm: {}\n", ("kind = 'slurn'", "'slurm'")),
        ("kind: slurm\n", ("needs the section slurm",)),
        (SLURM + KUBERNETES[KUBERNETES.index("kubernetes: {") :], ("no section kubernetes",)),
        ("kind: slurm\nslurm: {time: soon}\n", ("slurm.time = 'soon'",)),
        ('kind: slurm\nslurm: {partition: "x\\n#SBATCH"}\n', ("slurm.partition",)),
        (SLURM + "environment: {WANDB_API_KEY: abc}\n", ("WANDB_API_KEY", "secret")),
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
        assert write_job(run, [str(DEBUG)], cluster, 2, 1, tmp_path / path.stem).is_file()


def v4(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["v4", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


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


def local_job(tiny: Path, tmp_path: Path, text: str, steps: int) -> Path:
    """A job of one node on this machine's CPU."""
    text += f"gpus: false\nfolder: {ROOT}\npython: {sys.executable}\nport: {free_port()}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = load_cluster(str(tmp_path / "cluster.yaml"))
    arguments = [str(tiny), f"steps={steps}", f"run_dir={tmp_path / 'run'}"]
    run = load_config(tiny, arguments[1:])
    return write_job(run, arguments, cluster, 1, 1, tmp_path)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").is_file() or steps_in_file(run_dir)[-1:] < [step]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def fake_slurm(folder: Path) -> dict[str, str]:
    """scontrol and srun of a cluster whose only node is this one; both write down their calls."""
    folder.mkdir()
    tools = {
        "scontrol": f'echo "$@" >> {folder}/calls; if [[ $1 == show ]]; then echo localhost; fi',
        # Slurm's srun passes SIGTERM on to its tasks, and so does exec.
        "srun": f'echo srun >> {folder}/calls; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }
    for name, body in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "OMP_NUM_THREADS": "1"}


def test_slurm_saves_before_the_limit_and_queues_again(tiny: Path, tmp_path: Path) -> None:
    path = local_job(tiny, tmp_path, SLURM, 100_000)
    environment = fake_slurm(tmp_path / "bin")
    with subprocess.Popen(["bash", path], env=environment) as process:
        wait_for_step(tmp_path / "run", 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert (tmp_path / "bin/calls").read_text().splitlines()[-1] == "requeue 17"
    last = steps_in_file(tmp_path / "run")[-1]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}").is_dir()
    end = local_job(tiny, tmp_path, SLURM, last + 2)
    done = subprocess.run(["bash", end], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert (tmp_path / "bin/calls").read_text().count("requeue") == 1


def pod(manifest: Path) -> list[str]:
    job = yaml.safe_load(manifest.read_text())
    master = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    command = [*master["command"], *master["args"]]
    return [word.replace("v4-run-master-0", "localhost") for word in command]


@pytest.mark.slow
def test_a_pod_that_is_taken_away_saves_and_counts_as_interrupted(
    tiny: Path, tmp_path: Path
) -> None:
    text = "kind: kubernetes\nkubernetes: {image: x, claim: work, mount: /work}\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = pod(local_job(tiny, tmp_path, text, 100_000))
    with subprocess.Popen(command, env=environment) as process:
        wait_for_step(tmp_path / "run", 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    last = steps_in_file(tmp_path / "run")[-1]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}").is_dir()
    command = pod(local_job(tiny, tmp_path, text, last + 2))
    assert subprocess.run(command, env=environment).returncode == 0
    mistake = [word.replace(f"run_dir={tmp_path}/run", "data.shards=nowhere") for word in command]
    (tmp_path / f"run/checkpoints/step-{last + 2:08d}").rename(tmp_path / "elsewhere")
    assert subprocess.run(mistake, env=environment).returncode == 2


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tiny: Path, tmp_path: Path) -> None:
    """Slurm gets 137; a pod ends with 1, since the operator restarts all that end with more."""
    kubernetes = "kind: kubernetes\nkubernetes: {image: x, claim: work, mount: /work}\n"
    slurm = fake_slurm(tmp_path / "bin")
    for text, code in ((SLURM, 137), (kubernetes, 1)):
        job = local_job(tiny, tmp_path, text + "max_restarts: 0\n", 100_000)
        command = ["bash", str(job)] if code == 137 else pod(job)
        with subprocess.Popen(command, env=slurm, stderr=subprocess.PIPE, text=True) as process:
            wait_for_step(tmp_path / "run", 1, process)
            (worker,) = psutil.Process(process.pid).children(recursive=True)[-1:]
            words = worker.cmdline()
            assert words[words.index(str(tiny)) - 1] == "trainer"
            worker.kill()
            assert process.wait(60) == code
            assert process.stderr is not None
            assert "was killed by SIGKILL (signal 9)" in process.stderr.read()
        (tmp_path / "run/metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("error", "code"), [("RendezvousConnectionError: gone", 143), ("RuntimeError: ours", 1)]
)
def test_a_pod_that_has_lost_the_first_node_starts_again(
    tmp_path: Path, error: str, code: int
) -> None:
    torchrun = tmp_path / "python"
    page = json.dumps({"message": {"message": error}})
    torchrun.write_text(f"#!/bin/bash\necho '{page}' > $TORCHELASTIC_ERROR_FILE; exit 1\n")
    torchrun.chmod(0o755)
    text = f"python: {torchrun}\nfolder: {tmp_path}\nkind: kubernetes\n"
    job = write(tmp_path, text + "kubernetes: {image: x, claim: work, mount: /work}\n")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run(pod(job), env=environment, check=False).returncode == code
