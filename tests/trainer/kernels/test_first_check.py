"""The check at the first start: who checks and who waits, for how long, and on a full disk."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.activity import Activity
from data.errors import DataError
from data.lease import Lease, LeaseError, Owner
from data.lease_file import LocalLeaseFile
from tests.trainer.kernels.fake_check import GPU, QUIET, FakeCheck
from tests.trainer.kernels.test_verdict_file import PROBLEM, VERDICTS
from trainer.config import load_config
from trainer.kernels import commands, first_check, verdict_file
from trainer.kernels.check import check_kernels
from trainer.kernels.choose import unsupported_operations
from trainer.kernels.first_check import local_verdicts
from trainer.kernels.gpu import Platform
from trainer.kernels.problem import problem_of
from trainer.kernels.verdict import Problem, Verdict
from trainer.kernels.verdict_file import Key, cache_folder, path_of, read_verdicts, write_verdicts
from trainer.process.errors import PreflightError


def test_a_host_checks_once_and_the_next_start_not_at_all(
    gpu: torch.device, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    first = local_verdicts(config, gpu, QUIET, check=check)
    assert check.checked == [*first.verdicts] == [*problem_of(config, gpu).operations]
    assert "syrk" in check.checked and "norms" in check.checked
    out = capsys.readouterr().out
    assert f"kernels: checking {len(check.checked)} operations on NVIDIA H100 80GB HBM3" in out
    checked = len(check.checked)
    second = local_verdicts(config, gpu, QUIET, check=check)
    assert len(check.checked) == checked and second == first
    assert capsys.readouterr().out == ""


def test_nothing_is_checked_that_no_setting_asks_for(gpu: torch.device, tiny: Path) -> None:
    check = FakeCheck()
    local_verdicts(load_config(tiny, ["precision=bf16", "kernels=eager"]), gpu, QUIET, check=check)
    local_verdicts(load_config(tiny), torch.device("cpu"), QUIET, check=check)
    assert check.checked == []


def test_of_processes_with_the_same_gpu_one_checks(gpu: torch.device, tiny: Path) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    results: list[object] = []
    ranks = [
        threading.Thread(
            target=lambda index=index: results.append(
                local_verdicts(config, torch.device("cuda", index), QUIET, check=check)
            )
        )
        for index in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    assert len(results) == 2 and results[0] == results[1]
    assert check.checked == [*problem_of(config, gpu).operations]


def test_a_rank_whose_sizes_are_its_own_waits_for_no_other(
    gpu: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fit_to_memory may choose other microbatches on another GPU of the host."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    config, check = load_config(tiny, ["precision=bf16", "data.micro_batch_size=2"]), FakeCheck()
    start = time.monotonic()
    local = local_verdicts(config, gpu, QUIET, lambda: time.monotonic() - start > 20, check)
    assert [*local.verdicts] == [*problem_of(config, gpu).operations]


def test_an_operation_that_the_limit_left_out_has_that_reason(
    gpu: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may wait in the process group: as long as its timeout, and the check ends before."""
    monkeypatch.setattr(first_check, "TOTAL_SECONDS", 25.0)
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    clock = SimpleNamespace(monotonic=lambda: 10.0 * len(check.checked), sleep=time.sleep)
    monkeypatch.setattr(first_check, "time", clock)  # a check takes ten seconds
    verdicts = [*local_verdicts(config, gpu, QUIET, check=check).verdicts.values()]
    assert [verdict.passed for verdict in verdicts] == [True] * 3 + [False] * (len(verdicts) - 3)
    assert "had no time left for it" in verdicts[3].reason and verdicts[3].is_temporary


def test_a_host_without_a_compiler_uses_no_verdict_of_a_host_with_one(
    gpu: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a home, and so the file, which stays as it is."""
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    passed = local_verdicts(config, gpu, QUIET, check=check)
    check.checked.clear()
    monkeypatch.setattr(first_check, "missing_compiler", lambda: "install gcc")
    without = local_verdicts(config, gpu, QUIET, check=check, started=time.time() + 60)
    assert {(v.passed, v.reason) for v in without.verdicts.values()} == {(False, "install gcc")}
    assert check.checked == [] and without.verdicts.keys() == passed.verdicts.keys()
    monkeypatch.setattr(first_check, "missing_compiler", lambda: None)
    assert local_verdicts(config, gpu, QUIET, check=check) == passed


def test_a_temporary_failure_is_checked_again_at_the_next_start(
    gpu: torch.device, tiny: Path
) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    local_verdicts(config, gpu, QUIET, check=check)
    key = Key.of(GPU, problem_of(config, gpu))
    verdicts = read_verdicts(cache_folder(), key)
    assert verdicts is not None
    for name, is_temporary in (("norms", True), ("swiglu", False)):
        failed = Verdict(name, False, "no compiler", "eager", is_temporary=is_temporary)
        verdicts[name] = failed
    write_verdicts(cache_folder(), key, [*verdicts.values()])
    check.checked.clear()
    local = local_verdicts(config, gpu, QUIET, check=check)  # another process of this start
    assert check.checked == [] and not local.verdicts["norms"].passed
    local = local_verdicts(config, gpu, QUIET, check=check, started=time.time() + 60)
    assert check.checked == ["norms"]
    assert local.verdicts["norms"].passed and not local.verdicts["swiglu"].passed


def test_the_command_checks_every_kind_of_gpu_of_the_host(
    gpu: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three GPUs, the two kinds; it is one process, and no rank of a job."""
    names = ["A100", "A100", "H100"]
    kinds = [replace(GPU, name=name) for name in names]
    monkeypatch.setattr(Platform, "of", classmethod(lambda cls, device: kinds[device.index]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    checked: list[tuple[str, int]] = []

    def check_all(
        key: Key, index: int, activity: Activity, keep: Callable[[Verdict], None]
    ) -> tuple[Verdict, ...]:
        checked.append((key.platform.name, index))
        for verdict in VERDICTS:
            keep(verdict)
        return VERDICTS

    monkeypatch.setattr(commands, "check_all", check_all)
    *_, place = commands.check_command(load_config(tiny, ["precision=bf16"]))
    assert checked == [("A100", 0), ("H100", 2)]
    assert str(place).endswith(str(cache_folder())) and len([*cache_folder().glob("*.json")]) == 2


def test_the_command_reports_a_gpu_on_which_triton_runs_nothing(
    gpu: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a V100 and an H100 one is checked; a host with nothing to check is one sentence."""
    old, new = torch.device("cuda", 6), torch.device("cuda", 7)
    kinds = {old: replace(GPU, name="V100"), new: replace(GPU, name="H100")}
    capabilities = {old: (7, 0), new: (9, 0)}
    monkeypatch.setattr(commands, "kinds_of_gpu", lambda: [old, new])
    monkeypatch.setattr(Platform, "of", classmethod(lambda cls, device: kinds[device]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(commands, "check_all", partial(first_check.check_all, check=FakeCheck()))
    config = load_config(tiny, ["precision=bf16"])
    line = (
        "every operation runs eagerly on V100: Triton cannot run this, the GPU has compute "
        "capability 7.0, and the kernel needs 8.0"
    )
    first, *_, place = map(str, commands.check_command(config))
    assert first == line and place.startswith("verdicts are kept in")
    assert len([*cache_folder().glob("*.json")]) == 1
    monkeypatch.setattr(commands, "kinds_of_gpu", lambda: [old])
    with pytest.raises(PreflightError, match=f"^v4 kernels check: {line}$"):
        list(commands.check_command(config))


def test_the_command_names_what_triton_cannot_run(
    gpu: torch.device, tiny: Path, monkeypatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(commands, "check_all", partial(first_check.check_all, check=FakeCheck()))
    config = load_config(tiny, ["precision=bf16"])
    reasons = unsupported_operations(config, gpu)
    assert reasons  # the tiny model's widths are too narrow for some kernels
    lines = [*map(str, commands.check_command(config))]
    for operation, reason in reasons.items():
        assert f"{operation}: its Triton kernel is not used on this GPU: {reason}" in lines


def test_a_first_check_is_shorter_than_the_timeout_of_a_collective(tiny: Path) -> None:
    limits = [
        first_check.seconds_of_check(load_config(tiny, settings))
        for settings in ([], ["parallel.timeout_seconds=60"], ["parallel.timeout_seconds=7200"])
    ]
    assert limits == [480, 48, 480]


def test_a_damaged_file_is_made_again(
    gpu: torch.device, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    first = local_verdicts(config, gpu, QUIET, check=check)
    (path,) = cache_folder().glob("*.json")
    whole = path.read_text()
    path.write_text(whole[:100])
    checked = len(check.checked)
    assert local_verdicts(config, gpu, QUIET, check=check) == first
    assert len(check.checked) == 2 * checked and json.loads(path.read_text()) == json.loads(whole)
    assert f"{path} is damaged; the kernels are checked again\n" in capsys.readouterr().out


def test_a_signal_ends_the_check_and_the_next_start_has_the_rest(
    gpu: torch.device, tiny: Path
) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    result = local_verdicts(config, gpu, QUIET, lambda: len(check.checked) >= 3, check)
    assert len(check.checked) == 3 and result.verdicts == {}
    local_verdicts(config, gpu, QUIET, check=check)
    # The third had just been checked, or ended by the signal: that is not known.
    first, second, third, *rest = problem_of(config, gpu).operations
    assert check.checked == [first, second, third, third, *rest]


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes the disk of a folder full: its permissions still allow to write."""

    def fill(folder: Path) -> None:
        write, create = verdict_file.write_atomically, LocalLeaseFile.create

        def no_room(path: Path) -> None:
            if path.is_relative_to(folder):
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

        def write_atomically(path: Path, content: str) -> None:
            try:
                no_room(path)
            except OSError as error:
                raise DataError(f"cannot write {path}: {error.strerror}.") from error
            write(path, content)

        def create_lease(file: LocalLeaseFile, text: str) -> bool:
            no_room(file.path)
            return create(file, text)

        monkeypatch.setattr(verdict_file, "write_atomically", write_atomically)
        monkeypatch.setattr(LocalLeaseFile, "create", create_lease)

    return fill


def test_where_the_users_disk_is_full_the_runs_folder_has_the_verdicts(
    gpu: torch.device, tiny: Path, full: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    folder = cache_folder()
    full(folder)
    first = local_verdicts(config, gpu, QUIET, check=check)
    assert check.checked == [*first.verdicts] == [*problem_of(config, gpu).operations]
    own = config.run_dir / "kernels"
    out = capsys.readouterr().out
    assert f"kernels: cannot write {folder}/" in out
    assert f": Disk quota exceeded. Their verdicts go into {own}\n" in out
    second = local_verdicts(config, gpu, QUIET, check=check)  # another process, the next start
    assert second == first and len(check.checked) == len(first.verdicts)
    full(own)
    path_of(own, Key.of(GPU, problem_of(config, gpu))).unlink()
    with pytest.raises(LeaseError, match="Disk quota exceeded"):
        local_verdicts(config, gpu, QUIET, check=check)


def test_a_disk_that_is_full_after_the_check_ends_no_start(
    gpu: torch.device, tiny: Path, full: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny, ["precision=bf16"])

    class Fills(FakeCheck):
        """Fills the disk while it checks the second operation, as compilers may."""

        def __call__(self, problem: Problem, *arguments: Any, **keywords: Any) -> Any:
            if len(self.checked) == 1:
                full(Path(tiny.anchor))
            return super().__call__(problem, *arguments, **keywords)

    local = local_verdicts(config, gpu, QUIET, check=Fills())
    assert [*local.verdicts] == [*problem_of(config, gpu).operations]
    assert all(verdict.passed for verdict in local.verdicts.values())
    assert capsys.readouterr().out.count("This start uses the verdicts") == 1


def test_the_wait_for_another_check_ends_before_a_collective_would(
    gpu: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`v4 kernels check` may take an hour: what it has checked so far is used."""
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    key = Key.of(GPU, problem_of(config, gpu))
    folder = cache_folder()
    first, second, *rest = key.problem.operations
    write_verdicts(folder, key, check(replace(key.problem, operations=(first, second)), 0, print))
    monkeypatch.setattr(first_check, "TOTAL_SECONDS", 0.5)
    check.checked.clear()
    with Lease(folder, "v4 kernels check", name=first_check.lease_name(key)):
        local = local_verdicts(config, gpu, QUIET, check=check)
    assert check.checked == [] and [*local.verdicts] == [first, second, *rest]
    assert [verdict.passed for verdict in local.verdicts.values()][:3] == [True, True, False]
    assert all(local.verdicts[name].is_temporary for name in rest)
    assert "another process is still checking them" in capsys.readouterr().out


def test_a_signal_ends_the_wait_for_another_hosts_check(
    gpu: torch.device, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny, ["precision=bf16"])
    key = Key.of(GPU, problem_of(config, gpu))
    folder = cache_folder()
    other = Owner.current("v4 kernels check", folder, "").model_copy(update={"machine": "another"})
    folder.mkdir(parents=True)
    (folder / first_check.lease_name(key)).write_text(other.model_dump_json())
    start, check = time.monotonic(), FakeCheck()
    local = local_verdicts(config, gpu, QUIET, lambda: time.monotonic() - start > 1, check)
    assert local.verdicts == {} and check.checked == []
    assert "waiting for up to" not in capsys.readouterr().out


def test_a_signal_ends_what_is_being_checked(tiny: Path) -> None:
    start = time.monotonic()
    worker = (sys.executable, "-c", HANGS)
    one = replace(PROBLEM, operations=("norms",))
    (verdict,) = check_kernels(one, 0, print, stopped=lambda: True, worker=worker)
    assert not verdict.passed and time.monotonic() - start < 30


HANGS = "import time; time.sleep(600)"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.mark.parametrize(
    ("code", "reason"),
    [(HANGS, "took more than 1 seconds and was ended"), (DIES, "was killed by SIGSEGV")],
    ids=["hangs", "dies"],
)
def test_a_check_that_hangs_or_dies_is_ended_and_the_run_goes_on_eagerly(
    gpu: torch.device,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    reason: str,
) -> None:
    from trainer.kernels import RankKernels

    def check(
        problem: Problem,
        index: int,
        report: Callable[[str], None],
        *,
        seconds: float,
        stopped: Callable[[], bool],
    ) -> tuple[Verdict, ...]:
        worker, seconds = (sys.executable, "-c", code), min(seconds, 1)
        return check_kernels(
            problem, index, report, seconds=seconds, stopped=stopped, worker=worker
        )

    monkeypatch.setattr(first_check, "TOTAL_SECONDS", 2.5)  # the rest is not checked
    config = load_config(tiny, ["precision=bf16"])
    local = local_verdicts(config, gpu, QUIET, check=check)
    kernels = RankKernels.of(config, gpu, local).choices
    assert {choice.name for choice in kernels.by_operation().values()} == {"eager"}
    assert f"runs eagerly: its check {reason}" in capsys.readouterr().out
    assert local_verdicts(config, gpu, QUIET, check=check) == local  # from the file
