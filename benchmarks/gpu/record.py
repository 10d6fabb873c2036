"""What `make bench-gpu` leaves: one JSON for a GPU, from which docs/performance.md gets its row."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from data.errors import DataError, first_problem


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KernelTime(_Record):
    """A kernel of a step: its name, its launches, and the milliseconds of all of them."""

    name: str
    calls: int
    milliseconds: float


class StepRecord(_Record):
    """A training step with one setting of `kernels`.

    Attributes:
        config, row, micro_tokens: what ran: tokens of a row and of a microbatch.
        kernels: the setting.
        choices: the implementation of each operation.
        tokens_per_second: of steps with the config's own number of tokens.
        mfu: share of the bf16 matmul rate measured in the same process.
        matmul_flops, copied_bytes: that rate, and bytes copied per second.
        peak_gib: of tensors on the GPU; None on a CPU.
        busy: share of the step in which any kernel runs.
        launches: of a microbatch with its update.
        longest: the ten kernels that take longest.
    """

    config: str
    row: int
    micro_tokens: int
    kernels: str
    choices: dict[str, str]
    tokens_per_second: float
    mfu: float
    matmul_flops: float
    copied_bytes: float
    peak_gib: float | None
    busy: float
    launches: int
    longest: tuple[KernelTime, ...]


class CheckRecord(_Record):
    """An operation's verdict: trainer/kernels/verdict.py has the meaning of the fields."""

    operation: str
    passed: bool
    reason: str
    choice: str
    blocks: dict[str, int] = {}
    errors: dict[str, tuple[float | None, float | None]] = {}
    milliseconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    is_temporary: bool = False


class PartRecord(_Record):
    """How a part of the benchmark ended: its exit code, seconds, and the last line of its errors.

    `log` is the end of what it printed.
    """

    name: str
    code: int
    seconds: float
    problem: str = ""
    log: str = ""


class GpuRecord(_Record):
    """All that was measured on one GPU in one call."""

    date: str
    short: bool
    platform: dict[str, str | int]
    parts: tuple[PartRecord, ...] = ()
    check: tuple[CheckRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()

    @classmethod
    def read(cls, path: Path) -> GpuRecord:
        """Reads a file. Raises DataError where it is missing or no such record."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except ValidationError as error:
            raise DataError(
                f"{path} is no record of make bench-gpu: {first_problem(error)}"
            ) from None
