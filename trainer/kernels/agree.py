"""The kernels that all ranks of a job use, from what each of them could. Imports no torch.

An operation uses one implementation on all ranks: one that passed on every kind of GPU of the job.
Block sizes may differ between kinds of GPU, and are the same on all GPUs of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.kernels.operations import EAGER, IMPLEMENTATIONS, Choice, Kernels
from trainer.config import RunConfig
from trainer.kernels.choose import choose_kernels, run_operations, settings_without_effect
from trainer.kernels.gpu import Platform
from trainer.kernels.pinned import PinnedKernels, pin
from trainer.kernels.verdict import LocalVerdicts
from trainer.process.errors import PreflightError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RankKernels:
    """What one rank could use.

    Attributes:
        platform: its device, and what runs on it.
        key: digest of its verdicts' key; "" where none were needed.
        choices: what it would use on its own.
        passed: blocks of the Triton kernels that passed its check, by operation.
        refused: why implementations did not pass its check, by operation and name.
        problem: why it cannot run what the config demands; else "".
    """

    platform: Platform
    key: str = ""
    choices: Kernels = field(default_factory=Kernels)
    passed: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def of(cls, config: RunConfig, device: torch.device, local: LocalVerdicts) -> RankKernels:
        """Returns what this process could use, from the verdicts about its device."""
        try:
            choices = choose_kernels(config, device, local.verdicts)
        except PreflightError as error:
            return cls(local.platform, local.digest, problem=str(error))
        verdicts = local.verdicts.values()
        passed = {one.operation: dict(one.blocks) for one in verdicts if one.passed}
        refused = {
            one.operation: {
                name: reason
                for name in IMPLEMENTATIONS[one.operation]
                if name != "eager" and (reason := one.refusal(name)) is not None
            }
            for one in verdicts
        }
        return cls(local.platform, local.digest, choices, passed, refused)

    def candidate(self, operation: str, name: str) -> Choice | None:
        """Returns the implementation with this name, None if this rank cannot use it."""
        own: Choice = getattr(self.choices, operation)
        if own.name == name:
            return own
        if name == "eager":
            return EAGER
        if name == "triton" and operation in self.passed:
            return Choice("triton", self.passed[operation], "passed on every kind of GPU")
        return None


@dataclass(frozen=True)
class AgreedKernels:
    """The kernels of a job.

    Attributes:
        kernels: this rank's.
        pinned: those of all kinds of device, for the run's folder.
        lines: for the log.
    """

    kernels: Kernels
    pinned: PinnedKernels
    lines: tuple[str, ...] = ()


def agree(
    config: RunConfig,
    rank: int,
    everyone: Sequence[RankKernels],
    where: Callable[[int], str],
    pinned: PinnedKernels | None = None,
) -> AgreedKernels:
    """Returns the kernels of `rank`, the same names on all ranks.

    A run whose setting, GPUs and software are those of its `pinned` kernels keeps these, except
    where one of them fails the check, or where a Triton kernel passes that had failed.

    Args:
        where: names a rank, as "rank 3 on host-b".

    Raises PreflightError, the same on all ranks, for kernels that the config demands, or that the
    run has to keep, and that a rank cannot have.
    """
    for number, one in enumerate(everyone):
        if one.problem:
            raise PreflightError(f"{one.problem} ({where(number)})")
    kinds = {one.platform.label: one for one in reversed(everyone)}  # the first rank of each kind
    mine = everyone[rank].platform.label
    keeps = pinned is not None and _is_of(pinned, config, everyone)
    failures = _failures(pinned, everyone, where) if pinned is not None and keeps else {}
    gains = _gains(pinned, everyone) if pinned is not None and keeps else set()
    if config.deterministic:
        gains = set()
    without_effect = tuple(settings_without_effect(config))
    if pinned is not None and keeps and not failures and not gains:
        return AgreedKernels(pinned.kinds[mine].kernels(), pinned, without_effect)
    choices: dict[str, dict[str, Choice]] = {kind: {} for kind in kinds}
    lines = [*without_effect, *failures.values()]
    for operation in run_operations(config):
        if pinned is not None and keeps and operation not in {*failures, *gains}:
            for kind in kinds:
                choices[kind][operation] = pinned.kinds[kind].choices[operation]
            continue
        name, line = _common(operation, everyone, where)
        lines += [line] if line else []
        for kind, one in kinds.items():
            choices[kind][operation] = one.candidate(operation, name) or EAGER
    new = pin(
        config.kernels,
        {kind: (one.key, choices[kind], _failed(one)) for kind, one in kinds.items()},
    )
    if pinned is not None and (changes := _changes(pinned, new)):
        line = f"kernels changed since the run's last start: {'; '.join(changes)}"
        # Other degrees have matrices of other sizes: one run's phases may need other kernels.
        if config.deterministic and (keeps or len(config.recipe.segments) == 1):
            raise PreflightError(
                f"{'; '.join([*failures.values(), line])}; with deterministic = true a run keeps "
                "its kernels: set kernels to those that it had, or deterministic to false"
            )
        lines.append(f"{line}; results go on within rounding, not to the bit")
    return AgreedKernels(Kernels(**choices[mine]), new, tuple(lines))


def _is_of(pinned: PinnedKernels, config: RunConfig, everyone: Sequence[RankKernels]) -> bool:
    """Whether the kernels were pinned for this setting, and for these GPUs and their software."""
    kinds = pinned.kinds
    return pinned.setting == config.kernels and all(
        (kind := kinds.get(one.platform.label)) is not None
        and kind.key == one.key
        and kind.choices.keys() == set(run_operations(config))
        for one in everyone
    )


def _failures(
    pinned: PinnedKernels, everyone: Sequence[RankKernels], where: Callable[[int], str]
) -> dict[str, str]:
    """Returns a line for each operation whose pinned kernel fails the check of a rank."""
    lines: dict[str, str] = {}
    for rank, one in enumerate(everyone):
        for operation, choice in pinned.kinds[one.platform.label].choices.items():
            reason = one.refused.get(operation, {}).get(choice.name)
            if reason is not None:
                line = (
                    f"kernels: {choice.name}, which the run had for {operation}, fails the check "
                    f"on {one.platform.name} ({where(rank)}): {reason}"
                )
                lines.setdefault(operation, line)
    return lines


def _gains(pinned: PinnedKernels, everyone: Sequence[RankKernels]) -> set[str]:
    """Returns the operations whose Triton kernel had failed and now passes on all ranks."""
    failed = {operation for kind in pinned.kinds.values() for operation in kind.failed}
    return {operation for operation in failed if all(operation in one.passed for one in everyone)}


def _failed(one: RankKernels) -> list[str]:
    return [operation for operation, refused in one.refused.items() if "triton" in refused]


def _common(
    operation: str, everyone: Sequence[RankKernels], where: Callable[[int], str]
) -> tuple[str, str]:
    """Returns the implementation of all ranks, and a line where some would use another one."""
    wanted = [getattr(one.choices, operation) for one in everyone]
    names = sorted({choice.name for choice in wanted}, key=lambda name: name == "eager")
    if len(names) == 1:
        return names[0], ""
    without = 0
    for name in names:
        missing = [n for n, one in enumerate(everyone) if one.candidate(operation, name) is None]
        if not missing and name != "eager":
            return name, ""
        without = missing[0] if missing else without
    reasons = everyone[without].refused.get(operation, {})
    why = next((reasons[name] for name in names if name in reasons), wanted[without].why)
    return "eager", (
        f"kernels: {operation} runs eagerly on all ranks: on {everyone[without].platform.name} "
        f"({where(without)}), {why}"
    )


def _changes(old: PinnedKernels, new: PinnedKernels) -> list[str]:
    """Returns a clause for each operation with other names or block sizes than before."""
    operations = {name: None for kind in new.kinds.values() for name in kind.choices}
    changes = []
    for operation in operations:
        before, after = old.choices_of(operation), new.choices_of(operation)
        if not before or before == after:
            continue
        names = [sorted({name for name, _ in choices}) for choices in (after, before)]
        if names[0] == names[1]:
            changes.append(f"{operation} has other block sizes")
        else:
            changes.append(f"{operation} is {'/'.join(names[0])} and was {'/'.join(names[1])}")
    return changes


def unchecked(config: RunConfig, device: torch.device) -> AgreedKernels:
    """Returns the kernels of a process that neither checks its device nor asks other ranks.

    Raises PreflightError for a Triton kernel that the config demands and the device cannot run.
    """
    one = RankKernels.of(config, device, LocalVerdicts(Platform.of(device)))
    return agree(config, 0, [one], lambda rank: f"rank {rank}")
