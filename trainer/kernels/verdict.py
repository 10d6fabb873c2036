"""What a check of kernels is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trainer.kernels.gpu import Platform


@dataclass(frozen=True)
class Problem:
    """The sizes at which kernels are checked: those of the run.

    Attributes:
        model: the fields of the ModelConfig.
        dtype: of activations and weights.
        micro_tokens: tokens of a microbatch on one rank, sequence parts of other ranks excluded.
        operations: what to check, out of model.kernels.operations.OPERATIONS.
        matrices: distinct (rows, columns) of the matrices that Muon updates, for "syrk".
        matrix_dtype: in which Muon multiplies them.
        deterministic: whether the run demands deterministic algorithms.
        tensor, expert_tensor: ranks that share the shared expert's and a routed expert's inner
            width; `model` has the unsharded one.
    """

    model: Mapping[str, Any]
    dtype: Literal["bfloat16", "float16", "float32"]
    micro_tokens: int
    operations: tuple[str, ...]
    matrices: tuple[tuple[int, int], ...] = ()
    matrix_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    deterministic: bool = False
    tensor: int = 1
    expert_tensor: int = 1


@dataclass(frozen=True)
class Verdict:
    """The result of checking one operation on one GPU.

    Attributes:
        operation: one of model.kernels.operations.OPERATIONS.
        passed: whether the Triton kernel fits this GPU and is right there.
        reason: one sentence without a final dot: why the kernel failed, or why `choice` was chosen.
        choice: the fastest implementation that passed: "eager", "compile", "triton" or a library.
        blocks: the block sizes with which the Triton kernel passed and was fastest; empty where it
            failed or has no choice of sizes.
        errors: largest relative error by implementation, of outputs and of gradients (NaN where
            there are none). "eager" is the yardstick in the run's dtype.
        milliseconds: of forward and backward together, by implementation.
        refused: why others than eager and Triton were refused, by implementation.
        is_temporary: whether the kernel failed for a cause outside of it and of the verdicts' key,
            such as a missing compiler: the next start checks it again.
    """

    operation: str
    passed: bool
    reason: str
    choice: str
    blocks: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    is_temporary: bool = False

    @property
    def why(self) -> str:
        """The reason of the choice."""
        if self.passed or self.choice == "eager":
            return self.reason
        gain = self.milliseconds["eager"] / self.milliseconds[self.choice]
        return (
            f"{self.choice} is {gain:.2f} times as fast as eager; triton is refused: {self.reason}"
        )

    @property
    def notice(self) -> str:
        """A line about a Triton kernel that did not pass, and what runs instead."""
        if self.choice == "eager":
            return f"{self.operation} runs eagerly: {self.reason}"
        return (
            f"{self.operation} runs with {self.choice}, as its Triton kernel is refused: "
            f"{self.reason}"
        )

    def refusal(self, name: str) -> str | None:
        """Returns why an implementation other than eager was refused; None if it passed."""
        if name == "triton":
            return None if self.passed else self.reason
        return None if name in self.milliseconds else self.refused.get(name, self.reason)


@dataclass(frozen=True)
class LocalVerdicts:
    """What is known about the kernels on a process's device.

    Attributes:
        platform: the device, and what runs on it.
        digest: of the key of the verdicts; "" where none are needed.
        verdicts: by operation; empty where none are needed.
    """

    platform: Platform
    digest: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)


class CheckKernels(Protocol):
    """Checks kernels in subprocesses, one after the other, each with a time limit.

    A subprocess that hangs is ended, and one that dies is reported; either gives a Verdict with
    ``passed=False``, choice "eager" and the reason, and the next operation is checked.
    """

    def __call__(
        self,
        problem: Problem,
        device_index: int,
        report: Callable[[str], None],
        *,
        seconds: float,
        stopped: Callable[[], bool],
    ) -> tuple[Verdict, ...]:
        """Returns a Verdict for each of ``problem.operations``, in their order.

        Args:
            device_index: the GPU, as torch numbers it in this process.
            report: called with the operation that is being checked.
            seconds: limit of each operation.
            stopped: ends the check of an operation, which then has no meaning.
        """
