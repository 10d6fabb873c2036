"""What a compiled Triton kernel shows of its speed: memory, registers, copies, exchanges."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CompiledCode:
    """Attributes:
    shared_bytes: of a program.
    registers, stack_bytes: of a thread; a stack holds what did not fit into registers.
    pending_copies: the most asynchronous copies still under way while earlier ones are used.
    exchanges: changes of a tensor's layout, which move numbers between threads.
    """

    shared_bytes: int
    registers: int
    stack_bytes: int
    pending_copies: int
    exchanges: int

    @classmethod
    def of(cls, binary: Any) -> CompiledCode:
        """Reads a kernel that was compiled for NVIDIA's GPUs."""
        usage, layouts = _resources(binary.asm["cubin"]), binary.asm["ttgir"]
        waits = re.findall(r"async_wait\b.*?num = (\d+)", layouts)
        return cls(
            binary.metadata.shared,
            int(usage.split("REG:")[1].split()[0]),
            int(usage.split("STACK:")[1].split()[0]),
            max((int(count) for count in waits), default=0),
            layouts.count("ttg.convert_layout"),
        )


def _resources(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
