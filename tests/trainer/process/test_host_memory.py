"""A control group's limit counts as the machine's memory."""

from pathlib import Path

import psutil
import pytest

from trainer.process.host_memory import HostMemory

GIB = 1 << 30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def make(root: Path, cgroup: str, groups: dict[str, tuple[str, int, int]], names: tuple) -> Path:
    """A `proc` and a `sys` of these groups: limit, usage and cached bytes by folder."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, (limit, usage, cached) in groups.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / names[0]).write_text(f"{limit}\n")
        (path / names[1]).write_text(f"{usage}\n")
        (path / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")
    return root


def test_version_2(tmp_path: Path) -> None:
    groups = {"job/step": (str(GIB), GIB // 2, GIB // 8)}
    memory = HostMemory.read(make(tmp_path, "0::/job/step\n", groups, V2))
    assert memory == HostMemory(GIB, GIB // 2 + GIB // 8)


def test_the_smallest_limit_above_counts(tmp_path: Path) -> None:
    groups = {"job": (str(GIB), 0, 0), "job/step": ("max", 0, 0)}
    assert HostMemory.read(make(tmp_path, "0::/job/step\n", groups, V2)).total == GIB


def test_version_1_beside_others(tmp_path: Path) -> None:
    cgroup = "9:name=systemd:/\n4:cpu,memory:/job\n1:cpu:/\n0::/\n"
    groups = {"memory": (str((1 << 63) - 4096), 0, 0), "memory/job": (str(GIB), GIB + 7, 7)}
    assert HostMemory.read(make(tmp_path, cgroup, groups, V1)) == HostMemory(GIB, 0)


def test_a_container_sees_only_the_root_of_its_group(tmp_path: Path) -> None:
    cgroup = "4:memory:/docker/0123\n"
    memory = HostMemory.read(make(tmp_path, cgroup, {"memory": (str(GIB), 0, 0)}, V1))
    assert memory == HostMemory(GIB, GIB)


@pytest.mark.parametrize("cgroup", [None, "", "0::/job\n"])
def test_without_a_limit_it_is_the_machine(tmp_path: Path, cgroup: str | None) -> None:
    if cgroup is not None:
        make(tmp_path, cgroup, {"job": ("max", 0, 0)}, V2)
    memory = HostMemory.read(tmp_path)
    assert memory.total == psutil.virtual_memory().total
    assert 0 < memory.available <= memory.total
