"""Verdicts on disk: of this key and no other, whole or made again; who checks and who waits."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.activity import Activity
from data.lease import Owner
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

GPU = Platform("NVIDIA H100 80GB HBM3", "9.0", 132, "580.65", "2.13.0", "13.0", "3.7.1")
PROBLEM = Problem({"hidden_size": 64}, "bfloat16", 4096, ("attention", "norms"), ((8, 16),))
KEY = Key(GPU, PROBLEM, "0" * 64)
QUIET = Activity("checking kernels", visible=False)
VERDICTS = (
    Verdict("attention", False, "needs too much shared memory", "eager"),
    Verdict(
        *("norms", True, "1.8 times as fast as eager", "triton", {"rows": 4}),
        {"eager": (1e-3, 2e-3), "triton": (1e-3, float("nan"))},
        {"eager": 0.2, "triton": 0.11},
    ),
)


def test_verdicts_come_back_as_they_were(tmp_path: Path) -> None:
    write_verdicts(tmp_path, KEY, VERDICTS)
    verdicts = read_verdicts(tmp_path, KEY)
    assert verdicts is not None and repr(tuple(verdicts.values())) == repr(VERDICTS)  # NaN


OTHERS = {
    "GPU": replace(KEY, platform=replace(GPU, name="NVIDIA H200")),
    "capability": replace(KEY, platform=replace(GPU, capability="9.1")),
    "processors": replace(KEY, platform=replace(GPU, processors=114)),
    "driver": replace(KEY, platform=replace(GPU, driver="580.82")),
    "torch": replace(KEY, platform=replace(GPU, torch_version="2.14.0")),
    "CUDA": replace(KEY, platform=replace(GPU, cuda="13.1")),
    "triton": replace(KEY, platform=replace(GPU, triton="3.8.0")),
    "libraries": replace(KEY, platform=replace(GPU, libraries="quack 0.6.4")),
    "sources": replace(KEY, sources="1" * 64),
    "sizes": replace(KEY, problem=replace(PROBLEM, model={"hidden_size": 128})),
    "tokens": replace(KEY, problem=replace(PROBLEM, micro_tokens=8192)),
    "dtype": replace(KEY, problem=replace(PROBLEM, dtype="float16")),
    "matrices": replace(KEY, problem=replace(PROBLEM, matrices=((8, 8),))),
    "deterministic": replace(KEY, problem=replace(PROBLEM, deterministic=True)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_verdict_of_another_key_is_not_used(tmp_path: Path, what: str) -> None:
    other = OTHERS[what]
    write_verdicts(tmp_path, KEY, VERDICTS)
    assert read_verdicts(tmp_path, other) is None
    path_of(tmp_path, KEY).rename(path_of(tmp_path, other))  # or copied from another machine
    lines: list[str] = []
    assert read_verdicts(tmp_path, other, lines.append) is None
    assert lines == [
        f"{path_of(tmp_path, other)} is about another GPU, software or model; the kernels are "
        "checked again"
    ]


def test_a_change_of_a_kernels_source_is_another_key(tmp_path: Path) -> None:
    root = tmp_path / "model" / "kernels" / "norm"
    root.mkdir(parents=True)
    (root / "norm_triton.py").write_text("BLOCK = 1\n")
    before = verdict_file.source_digest(tmp_path)
    (root / "norm_triton.py").write_text("BLOCK = 2\n")
    assert verdict_file.source_digest(tmp_path) != before


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "other JSON": lambda text: '{"key": {}, "verdicts": 3}',
    "no such implementation": lambda text: text.replace('"choice": "triton"', '"choice": "os"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_none_and_has_a_line(tmp_path: Path, damage: str) -> None:
    write_verdicts(tmp_path, KEY, VERDICTS)
    path = path_of(tmp_path, KEY)
    path.write_text(DAMAGES[damage](path.read_text()))
    lines: list[str] = []
    assert read_verdicts(tmp_path, KEY, lines.append) is None
    assert lines == [f"{path} is damaged; the kernels are checked again"]


def test_the_cache_is_the_users_or_the_runs_where_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(tmp_path / "run") == tmp_path / "v4-pretrain" / "kernels"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(tmp_path / "run") == tmp_path / "run"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(tmp_path / "run") == tmp_path / ".cache" / "v4-pretrain" / "kernels"


class FakeCheck:
    """Stands for the check; counts what it was asked."""

    def __init__(self) -> None:
        self.checked: list[str] = []

    def __call__(
        self,
        problem: Problem,
        device_index: int,
        report: Callable[[str], None],
        *,
        seconds: float,
        stopped: Callable[[], bool],
    ) -> tuple[Verdict, ...]:
        time.sleep(0.01)
        self.checked += problem.operations
        passed = [Verdict(name, True, "fast", "triton") for name in problem.operations]
        return tuple(passed)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A host with two GPUs of a kind, as far as torch's numbers go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Platform, "of", classmethod(lambda cls, device: GPU))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(first_check, "POLL_SECONDS", 0.01)
    return torch.device("cuda", 0)


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

    def check_all(key: Key, index: int, activity: Activity) -> tuple[Verdict, ...]:
        checked.append((key.platform.name, index))
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


def test_a_signal_ends_the_check_and_leaves_no_file(gpu: torch.device, tiny: Path) -> None:
    config, check = load_config(tiny, ["precision=bf16"]), FakeCheck()
    result = local_verdicts(config, gpu, QUIET, lambda: len(check.checked) >= 2, check)
    assert len(check.checked) == 2 and result.verdicts == {}
    assert not [*cache_folder().glob("*.json")]


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
