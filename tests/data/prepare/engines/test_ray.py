"""Tasks of Ray on a real cluster of two nodes on loopback."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import data.prepare.engines.engine
import data.prepare.work_item
from data.config import DataConfig
from data.errors import DataError
from data.prepare.run import prepare
from tests.data.prepare.engines.corpora import (
    PROCESS_BYTES,
    contents,
    elsewhere,
    killer,
    some_parts,
)
from tests.distributed import free_port, server


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the head of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # the machine has other work
    options = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False} | options)
    try:
        cluster.add_node(**options)
        yield cluster.address
    finally:
        cluster.shutdown()


def _prepare(config: DataConfig, output: Path) -> None:
    """The command, in a process of its own, which connects to the cluster."""
    data.prepare.work_item._ITEM_BYTES = 1
    data.prepare.engines.engine._BYTES_PER_PROCESS = PROCESS_BYTES
    with output.open("w") as sys.stderr:
        prepare(config)


@pytest.mark.slow
def test_the_same_shards_from_two_nodes_with_a_killed_worker(
    config: DataConfig, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = some_parts(config, tmp_path, monkeypatch)
    prepare(one, progress=False)
    two = elsewhere(one, "ray", engine="ray", ray={"address": address}, prepare_workers=2)
    with killer(two, "*.verdicts.npy") as killed:
        driver = server().Process(target=_prepare, args=(two, tmp_path / "output"))
        driver.start()
        driver.join()
    output = (tmp_path / "output").read_text()
    assert driver.exitcode == 0, output
    assert contents(two) == contents(one)
    assert killed and f"v4: {killed[0]} failed (" in output and "attempt 1 of 3" in output


def test_no_cluster_there(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = some_parts(config, tmp_path, monkeypatch)
    ray = {"address": f"127.0.0.1:{free_port()}"}
    with pytest.raises(DataError, match=r"no cluster answers at 127\.0\.0\.1:\d+: .*refused"):
        prepare(elsewhere(one, "ray", engine="ray", ray=ray), progress=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"data\.engine is ray, which is not installed"):
        prepare(elsewhere(one, "ray", engine="ray"), progress=False)
    with pytest.raises(ValueError, match=r"ray\.address"):
        elsewhere(one, "ray", ray={"address": "ray://localhost:10001"})
