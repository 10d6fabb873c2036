"""Jobs on a real Slurm: time limits, nodes that die, GPUs, two jobs for one run folder."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from launch.cluster import load_cluster, write_job, write_sweep_job
from launch.job import Nodes
from launch.sweep_job import write_array
from tests.distributed import free_port, spawn
from tests.launch.jobs import check_script
from tests.launch.sweeps import GRID, write
from tests.slurm_cluster import SlurmCluster, hostlist, missing_program
from tests.trainer.config.test_recipe import phased
from tests.trainer.tiny import assert_same_run, steps_in_file, train_jobs
from tests.wandb_server import ServedSweep, wandb_server
from trainer.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 80  # enough that a job is not over before a command of Slurm has arrived
RUN = [f"steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=0"]
LIMIT = 280.0  # seconds that one job may take
SAVE_SECONDS = 90
SIGNAL_SECONDS = SAVE_SECONDS + 60  # before the time limit; Slurm looks every half minute
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def without(why: str) -> NoReturn:
    """Skips where Slurm is not installed; fails where .ci/run should have installed it."""
    if os.environ.get("CI"):
        pytest.fail(f"a Slurm cluster is needed here, and {why}")
    pytest.skip(f"needs a Slurm cluster, and {why}: apt-get install slurm-wlm munge")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four nodes on this machine; nothing of them is left afterwards."""
    if (missing := missing_program()) is not None:
        without(f"there is no `{missing}`")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def job_file(
    config: Path, out: Path, *overrides: str, nodes: str = "2", gpus: int = 0, more: str = ""
) -> Path:
    """What `v4 plan --cluster` writes for a run, by default in `out`/run."""
    out.mkdir(exist_ok=True)
    settings = f"kind: slurm\nfolder: {ROOT}\npython: {sys.executable}\nport: {free_port()}\n"
    more = more if "slurm:" in more else f"{more}\nslurm: {{}}"
    (out / "cluster.yaml").write_text(f"{settings}save_seconds: {SAVE_SECONDS}\n{more}\n")
    arguments = [f"run_dir={out / 'run'}", *overrides]
    run = load_config(config, arguments)
    cluster, of_job = load_cluster(str(out / "cluster.yaml")), Nodes.parse(nodes)
    return write_job(run, [str(config), *arguments], cluster, of_job, gpus, out)


def wait_until(
    cluster: SlurmCluster, number: int | str, is_true: Callable[[dict[str, str]], bool]
) -> dict[str, str]:
    """Waits for a job's fields to fulfil a condition, and returns them."""
    deadline = time.monotonic() + LIMIT
    while not is_true(job := cluster.job(number)):
        if time.monotonic() > deadline:
            pytest.fail(f"{job}\n{log_of(job)}\n{cluster.logs()}")
        time.sleep(0.2)
    return job


def log_of(job: dict[str, str]) -> str:
    path = Path(job["StdOut"])
    return path.read_text() if path.is_file() else ""


def end_of(cluster: SlurmCluster, number: int | str) -> tuple[dict[str, str], str]:
    """Waits for the end of a job; returns its fields and its log."""
    job = wait_until(cluster, number, lambda job: job["JobState"] in ENDED)
    return job, log_of(job)


def seconds_of(time: str) -> int:
    """Parses Slurm's HH:MM:SS."""
    hours, minutes, seconds = map(int, time.split(":"))
    return (60 * hours + minutes) * 60 + seconds


def last_step(run_dir: Path) -> int:
    if not (run_dir / "metrics.jsonl").is_file():
        return 0
    return max(steps_in_file(run_dir), default=0)


@pytest.fixture(scope="module")
def endless(
    cluster: SlurmCluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """A job of two nodes that does not end by itself, and its run folder."""
    out = tmp_path_factory.mktemp("endless")
    config = out / "run.yaml"
    config.write_text(f"base: {tiny}\nsteps: 1000000\n")
    job = job_file(config, out)
    number = cluster.submit(job, hostlist("n1", "n2"))
    wait_until(cluster, number, lambda _: last_step(out / "run") > 2)
    return number, out / "run"


def test_a_second_job_in_the_run_folder_is_refused(
    cluster: SlurmCluster, endless: tuple[int, Path], tiny: Path, tmp_path: Path
) -> None:
    number, run_dir = endless
    job = job_file(
        tiny, tmp_path, f"run_dir={run_dir}", "steps=1000000", nodes="1", more="max_restarts: 0"
    )
    state, log = end_of(cluster, cluster.submit(job, hostlist("n3")))
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0"), log
    sentences = [line for line in log.splitlines() if line.startswith("v4: error: ")]
    assert len(sentences) == 1 and f"{run_dir}: `v4 train` (process" in sentences[0], log
    assert cluster.job(number)["JobState"] == "RUNNING"


def test_gpus_are_a_resource_of_the_job(cluster: SlurmCluster, tiny: Path, tmp_path: Path) -> None:
    """The devices are files; what the tasks get from Slurm is what a node with GPUs gives them.

    Between two phases with other degrees the processes start again, which is no restart.
    """
    show = "srun bash -c 'echo $SLURMD_NODENAME has $CUDA_VISIBLE_DEVICES'"
    more = f"max_restarts: 0\nslurm: {{setup: [{json.dumps(show)}]}}"
    phases = [
        {"until_tokens": 180, "attention": "dense"},
        {"until_tokens": 500, "attention": "dense", "parallel": {"tensor": 2}},
    ]
    config = phased(tiny, tmp_path, phases)
    job = job_file(config, tmp_path, "device=cpu", gpus=1, more=more)
    state, log = end_of(cluster, cluster.submit(job, hostlist("n3", "n4")))
    assert (state["JobState"], state["TresPerNode"]) == ("COMPLETED", "gres:gpu:1"), log
    assert (state["Restarts"], log.count("on 2 processes; loading torch")) == ("0", 2), log
    assert "n3 has 0\n" in log and "n4 has 0\n" in log, log
    assert steps_in_file(tmp_path / "run") == [1, 2, 3]
    many = job_file(tiny, tmp_path / "many", "data.global_batch_size=6", gpus=3)
    refused = cluster.run("sbatch", many)
    assert refused.returncode and "Requested node configuration is not available" in refused.stderr


def test_a_job_saves_before_its_time_limit_and_is_requeued_until_it_ends(
    cluster: SlurmCluster, endless: tuple[int, Path], tiny: Path
) -> None:
    number, run_dir = endless
    minutes = (seconds_of(cluster.job(number)["RunTime"]) + SIGNAL_SECONDS) // 60
    cluster.run("scontrol", "update", f"jobid={number}", f"timelimit={minutes}")
    job = wait_until(cluster, number, lambda job: any(run_dir.glob("checkpoints/step-*")))
    (run_dir.parent / "run.yaml").write_text(f"base: {tiny}\nsteps: {last_step(run_dir) + 3}\n")
    job = wait_until(cluster, number, lambda job: job["JobState"] == "PENDING")
    last = last_step(run_dir)
    assert (run_dir / f"checkpoints/step-{last:08d}").is_dir()
    job, log = end_of(cluster, number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert job["Restarts"] != "0"
    assert steps_in_file(run_dir) == list(range(1, last + 4)), log
    assert "resumed from" in log and "exiting via 9" not in log, log


def test_a_job_of_an_array_is_requeued_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Although the number of one of them is that of the array; all others go on."""
    task = tmp_path / "python"
    task.write_text("#!/bin/bash\ntrap 'kill $!; exit 0' TERM\necho begins\nsleep 300 & wait\n")
    task.chmod(0o755)
    text = f"kind: slurm\ngpus: false\nfolder: {tmp_path}\npython: {task}\nslurm: {{}}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    settings = load_cluster(str(tmp_path / "cluster.yaml"))
    array = cluster.submit(write_sweep_job(settings, "-m x", [], 2, tmp_path))
    jobs = [f"{array}_{index}" for index in range(2)]
    for job in jobs:
        wait_until(cluster, job, lambda job: "begins" in log_of(job))
    number = next(job for job in jobs if cluster.job(job)["JobId"] == str(array))
    cluster.run("scancel", "--batch", "--signal=TERM", number)
    wait_until(cluster, number, lambda job: job["Restarts"] == "1")
    (other,) = set(jobs) - {number}
    assert cluster.job(other)["JobState"] == "RUNNING" and cluster.job(other)["Restarts"] == "0"
    cluster.run("scancel", "--signal=URG", other)
    assert end_of(cluster, other)[0]["JobState"] == "COMPLETED"
    cluster.run("scancel", str(array))


def test_a_sweep_is_an_array_whose_jobs_share_the_trials(
    cluster: SlurmCluster, tiny: Path, tmp_path: Path
) -> None:
    """A trial that fails is not tried by the array's other job, but by the next array."""
    shards, out = tmp_path / "shards", tmp_path / "out"
    body = "method: grid\nparameters:\n  steps: {value: 2}\n  data.shards:\n"
    body += f"    values: ['{tiny.parent}/shards', '{shards}']\n"
    settings = f"kind: slurm\ngpus: false\nfolder: {ROOT}\npython: {sys.executable}\nslurm: {{}}\n"
    (tmp_path / "cluster.yaml").write_text(settings)
    file = str(write(tiny, tmp_path, body))
    job = write_array(file, out, 2, 0, str(tmp_path / "cluster.yaml"), None)
    check_script(job.read_text())
    for starts, states in ((2, ["complete", "fail"]), (1, ["complete", "complete"])):
        number = cluster.submit(job)
        logs = "".join(end_of(cluster, f"{number}_{index}")[1] for index in range(2))
        trials = json.loads((out / "sweep.json").read_text())["trials"]
        assert [trial["state"] for trial in trials] == states, logs
        assert logs.count(" starts: ") == starts, logs
        if not shards.exists():
            shards.symlink_to(tiny.parent / "shards")
    assert "best: trial" in logs and (out / "report.html").is_file(), logs


def test_the_agents_of_a_wandb_sweep_are_an_array(
    cluster: SlurmCluster, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb's own agents, and a server that stands in for wandb's.

    Each trial has a folder of its own. A job that is to end lets its trial save, and is requeued;
    the key comes from the environment of sbatch.
    """
    file = write(tiny, tmp_path, GRID)
    trials = {"endless": {"steps": 1_000_000}, "short": {"steps": 2, "metrics.wandb.mode": "auto"}}
    for name, value in (("WANDB_API_KEY", "0123456789" * 4), ("PYTHONPATH", str(ROOT))):
        monkeypatch.setitem(cluster.environment, name, value)
    with wandb_server("ok", ServedSweep(file.read_text(), dict(trials))) as server:
        settings = f"kind: slurm\ngpus: false\nfolder: {tmp_path}\npython: {sys.executable}\n"
        settings += (
            f"save_seconds: 60\nslurm: {{}}\nenvironment: {{WANDB_BASE_URL: {server.url}}}\n"
        )
        (tmp_path / "cluster.yaml").write_text(settings)
        out, sweep = tmp_path / "out", "me/mine/abc12345"
        job = write_array(str(file), out, 2, 0, str(tmp_path / "cluster.yaml"), sweep)
        check_script(job.read_text())
        assert cluster.run("sbatch", "--test-only", job).returncode == 0
        array = cluster.submit(job)
        jobs = [f"{array}_{index}" for index in range(2)]
        folder = tmp_path / "runs/sweeps/abc12345"
        wait_until(cluster, jobs[0], lambda _: last_step(folder / "endless") > 2)
        (busy,) = [job for job in jobs if "1000000" in log_of(cluster.job(job))]
        (other,) = set(jobs) - {busy}
        state, log = end_of(cluster, other)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), log
        cluster.run("scancel", "--batch", "--signal=TERM", busy)
        state, log = end_of(cluster, busy)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    last = last_step(folder / "endless")
    assert (folder / f"endless/checkpoints/step-{last:08d}").is_dir(), log
    assert steps_in_file(folder / "short") == [1, 2]
    body = next(body for _, body in server.requests if b"mutation UpsertBucket" in body)
    opened = json.loads(body)["variables"]
    assert (opened["name"], opened["sweep"], opened["project"]) == ("short", "abc12345", "mine")
    assert len(server.history()) == 2


def test_a_job_takes_in_a_node_that_comes_back(
    cluster: SlurmCluster, tiny: Path, tmp_path: Path
) -> None:
    """`--nodes 1:2`: its first start has one node, and the next one, after a signal, has both."""
    cluster.run("scontrol", "update", "nodename=n4", "state=drain", "reason=test")
    job = job_file(tiny, tmp_path, *RUN, nodes="1:2")
    number = cluster.submit(job, "--exclude=n1,n2")
    wait_until(cluster, number, lambda _: last_step(tmp_path / "run") > 2)
    assert cluster.job(number)["NodeList"] == "n3"
    cluster.run("scontrol", "update", "nodename=n4", "state=resume")
    wait_until(cluster, number, lambda _: cluster.node_state("n4") == "IDLE")
    cluster.run("scancel", "--batch", "--signal=TERM", str(number))
    state, log = end_of(cluster, number)
    assert (state["JobState"], state["NodeList"], state["Restarts"]) == ("COMPLETED", "n[3-4]", "1")
    assert "on 1 process; loading torch" in log and "on 2 processes; loading torch" in log, log
    assert steps_in_file(tmp_path / "run") == list(range(1, STEPS + 1))


def test_a_job_outlives_a_node(cluster: SlurmCluster, tiny: Path, tmp_path: Path) -> None:
    """Its node is drained, which changes nothing for the job, and then loses its power.

    Slurm starts the job again, on another node instead, with the losses of an undisturbed run.
    """
    spawn(train_jobs, 2, tiny, tmp_path, [("undisturbed", RUN, 0)], timeout=LIMIT)
    run_dir = tmp_path / "run"
    number = cluster.submit(job_file(tiny, tmp_path, *RUN), "--exclude=n3,n4")
    cluster.run("scontrol", "update", f"jobid={number}", "excnodelist=")
    wait_until(cluster, number, lambda _: last_step(run_dir) > 3)
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    assert "DRAIN" in cluster.node_state("n2")
    wait_until(cluster, number, lambda _: last_step(run_dir) > 12)
    cluster.kill_node("n2")
    job, log = end_of(cluster, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert job["NodeList"] != "n[1-2]" and "resumed from" in log
    assert steps_in_file(run_dir) == list(range(1, STEPS + 1))
    assert_same_run(tmp_path / "undisturbed", run_dir, STEPS)
    cluster.start_node("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
