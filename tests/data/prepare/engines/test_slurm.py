"""Tasks as jobs of a real Slurm cluster of two nodes on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.prepare.engines.slurm import _divide
from data.prepare.filter_pass import FilterTask
from data.prepare.run import prepare
from tests.data.prepare.engines.corpora import contents, elsewhere, killer, some_parts
from tests.slurm_cluster import SlurmCluster, missing_program


@pytest.fixture
def cluster(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    if (missing := missing_program()) is not None and not os.environ.get("CI"):
        pytest.skip(f"needs a Slurm cluster, and there is no {missing}")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), ("n1", "n2"), cpus=1)
    try:
        cluster.start()
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, cluster.environment[name])
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
def test_the_same_shards_from_two_nodes_with_a_killed_worker(
    config: DataConfig,
    cluster: SlurmCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = some_parts(config, tmp_path, monkeypatch)
    prepare(one, progress=False)
    slurm = {"gigabytes_per_cpu": 1, "options": {"comment": "test"}}
    two = elsewhere(one, "slurm", engine="slurm", slurm=slurm, prepare_workers=2)
    with killer(two, "*.verdicts.npy") as killed:
        prepare(two, progress=False)
    assert contents(two) == contents(one)
    error = capsys.readouterr().err
    assert killed and f"v4: {killed[0]} failed (job " in error
    assert "of Slurm ended: FAILED), attempt 1 of 3" in error
    assert not cluster.run("squeue", "--noheader").stdout


def test_no_slurm_here(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = some_parts(config, tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.engine is slurm, and there is no `squeue` on this"):
        prepare(elsewhere(one, "slurm", engine="slurm"), progress=False)


def test_jobs_are_of_equal_size_and_worth_their_start() -> None:
    tasks = [FilterTask(name=str(i), size=size << 20, item=i) for i, size in enumerate([90] * 40)]
    jobs = _divide(tasks, 2)
    assert sorted(len(job) for job in jobs) == [1] * 16 + [2] * 12
    assert {task.name for job in jobs for task in job} == {task.name for task in tasks}
    assert [len(job) for job in _divide(tasks[:3], 8)] == [1, 1, 1]
    assert len(_divide(tasks[:4], 2)) == 2
