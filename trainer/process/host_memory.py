"""Memory of the host that this process may use: of the machine, or of its control group.

A container, a Slurm job or a systemd unit has a control group. The kernel kills a process of a
group that outgrows its limit, however much memory the machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

UNLIMITED = 1 << 60
"""Version 1 writes a number near 2^63 where there is no limit, version 2 the word `max`."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes in total, and those that are neither used nor needed for files in use."""

    total: int
    available: int

    @classmethod
    def read(cls, root: Path = Path("/")) -> HostMemory:
        """Reads the machine's memory and the limits of this process's control groups.

        `root` is where `proc` and `sys` are.
        """
        machine = psutil.virtual_memory()
        total, available = machine.total, machine.available
        for group in _control_groups(root):
            limit = _number(group.limit)
            if limit is None or limit >= UNLIMITED:
                continue
            total = min(total, limit)
            used = (_number(group.usage) or 0) - _cached(group.folder / "memory.stat")
            available = min(available, max(limit - used, 0))
        return cls(total, available)


@dataclass(frozen=True)
class _ControlGroup:
    folder: Path
    version: int

    @property
    def limit(self) -> Path:
        return self.folder / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")

    @property
    def usage(self) -> Path:
        return self.folder / ("memory.current" if self.version == 2 else "memory.usage_in_bytes")


def _control_groups(root: Path) -> Iterator[_ControlGroup]:
    """Yields the groups of this process that exist, of both versions, each with those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no control groups here
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = mount, 2
        elif "memory" in controllers.split(","):
            base, version = mount / "memory", 1
        else:
            continue
        # In a container the path may be that of the host, of which only the root is visible.
        folder = base / path.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate.is_relative_to(base) and candidate.is_dir():
                yield _ControlGroup(candidate, version)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cached(stat: Path) -> int:
    """Returns the bytes of files that the kernel drops before it kills a process."""
    try:
        lines = stat.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(" ", 1) for line in lines)
    return int(sizes.get("total_inactive_file", sizes.get("inactive_file", 0)))
