"""What a run on the fake GPU did that a real one would not forgive."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OWN = str(Path(__file__).parent)


@dataclass
class Report:
    """Counts by place: the innermost lines of the project, `file:line (function) < ...`.

    Attributes:
        waits: the host waited for the device: a number read, a blocking copy to the host, an
            operation whose result has as many elements as its input's values say.
        queued: the least work that the device was given between an event and the host's wait for
            it, in launches.
        blocking_copies: to the device, from pageable memory or without `non_blocking`.
        mixed: tensors of host and device in one operation.
        refused: what NCCL or the launch of a kernel refuses.
        operations: operators that launch a kernel on the device, by name.
        collectives: by name, device and dtype.
        launches: of Triton kernels, by name.
        variants: of Triton kernels, what each variant was compiled for.
        matmul_flops: by dtype.
        bytes: read and written by operators, as if each read its inputs and wrote its outputs once.
    """

    waits: Counter[str] = field(default_factory=Counter)
    queued: dict[str, int] = field(default_factory=dict)
    blocking_copies: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    collectives: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    variants: dict[str, set[tuple[object, ...]]] = field(default_factory=lambda: defaultdict(set))
    matmul_flops: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def problems(self) -> dict[str, int]:
        """Everything but the waits that is always a fault."""
        return dict(self.blocking_copies + self.mixed + self.refused)

    @property
    def num_launches(self) -> int:
        """Kernels launched, of torch and of Triton."""
        return self.operations.total() + self.launches.total()

    @property
    def num_variants(self) -> int:
        """Triton kernels compiled."""
        return sum(len(variants) for variants in self.variants.values())


def place(depth: int = 3) -> str:
    """The innermost `depth` lines of the project that led here."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < depth:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and not file.startswith(_OWN) and "/.venv/" not in file:
            local = file.removeprefix(f"{ROOT}/")
            lines.append(f"{local}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return " < ".join(lines)
