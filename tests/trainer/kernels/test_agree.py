"""Kernels of a job whose ranks have other GPUs, and of a run that resumes: through preflight."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.kernels.operations import Choice, Kernels
from tests.distributed import spawn
from trainer.__main__ import main
from trainer.config import load_config
from trainer.kernels import KERNELS_FILE, LocalVerdicts, Platform, RankKernels, Verdict
from trainer.parallel.grid import Degrees, Grid
from trainer.preflight import preflight
from trainer.process.errors import PreflightError

H100 = Platform("NVIDIA H100 80GB HBM3", "9.0", 132, "580.65", "2.13.0", "13.0", "3.7.1")
A100 = Platform("NVIDIA A100-SXM4-80GB", "8.0", 108, "580.65", "2.13.0", "13.0", "3.7.1")
TRITON = Choice("triton", {"rows": 64}, "1.9 times as fast as eager")
SLOWER = Choice("eager", {}, "the Triton kernel is slower")
FAILED = Choice("eager", {}, "needs 180,224 bytes of shared memory, it has 166,912")
H100_RANK = RankKernels(
    H100,
    "a" * 64,
    Kernels(attention=TRITON, norms=TRITON, swiglu=TRITON, compressor=SLOWER, syrk=TRITON),
    {name: {"rows": 64} for name in ("attention", "norms", "swiglu", "compressor", "syrk")},
)
A100_RANK = RankKernels(
    A100,
    "b" * 64,
    Kernels(
        attention=FAILED,
        norms=SLOWER,
        swiglu=replace(TRITON, blocks={"rows": 32}),
        compressor=TRITON,
        syrk=Choice("eager", {}, "its check was killed"),
    ),
    {name: {"rows": 32} for name in ("norms", "swiglu", "compressor")},
)


def agreed(rank: int, world_size: int, tiny: Path, folder: Path) -> tuple[Any, ...]:
    """Preflight's result where rank 0 has an H100 and rank 1 an A100."""
    grid = Grid.build(Degrees(dist.get_world_size()), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"host-{rank}")
        config = load_config(tiny, [f"run_dir={folder}"])
        return preflight(config, grid, (H100_RANK, A100_RANK)[rank])


def test_two_kinds_of_gpu_take_what_passed_on_both(tiny: Path, tmp_path: Path) -> None:
    (warnings, one), (_, other) = spawn(agreed, 2, tiny, tmp_path / "run")
    names = {name: choice.name for name, choice in one.kernels.by_operation().items()}
    assert names == {n: choice.name for n, choice in other.kernels.by_operation().items()}
    assert {name for name, what in names.items() if what == "triton"} == {
        *("norms", "swiglu", "compressor")
    }
    assert one.kernels.norms.blocks == {"rows": 64} and other.kernels.norms.blocks == {"rows": 32}
    assert (
        one.lines
        == other.lines
        == (
            "kernels: attention runs eagerly on all ranks: on NVIDIA A100-SXM4-80GB (rank 1 on "
            "host-1), needs 180,224 bytes of shared memory, it has 166,912",
            "kernels: syrk runs eagerly on all ranks: on NVIDIA A100-SXM4-80GB (rank 1 on host-1), "
            "its check was killed",
        )
    )
    assert warnings == [
        "rank 0 on host-0 and rank 1 on host-1 have different GPUs: NVIDIA H100 80GB HBM3 (9.0, "
        "132 SMs) and NVIDIA A100-SXM4-80GB (8.0, 108 SMs)"
    ]


def refused(rank: int, world_size: int, tiny: Path, folder: Path) -> str:
    grid = Grid.build(Degrees(dist.get_world_size()), torch.device("cpu"))
    problem = "kernels.attention = triton: no" if rank else ""
    kernels = replace(A100_RANK if rank else H100_RANK, problem=problem)
    with pytest.raises(PreflightError) as caught:
        preflight(load_config(tiny, [f"run_dir={folder}"]), grid, kernels)
    return str(caught.value)


def test_what_one_rank_cannot_run_is_refused_on_all(tiny: Path, tmp_path: Path) -> None:
    one, other = spawn(refused, 2, tiny, tmp_path / "run")
    assert one == other and one.startswith("kernels.attention = triton: no (rank 1 on ")


def alone(tiny: Path, folder: Path, kernels: RankKernels, *overrides: str) -> Any:
    """What one process with these kernels agrees on; it keeps them in the folder."""
    config = load_config(tiny, [f"run_dir={folder}", *overrides])
    warnings, result = preflight(config, Grid.single(torch.device("cpu")), kernels)
    folder.mkdir(exist_ok=True)
    result.pinned.write(folder)
    return warnings, result


def test_a_resume_keeps_its_kernels_while_its_gpu_and_software_stay(
    tiny: Path, tmp_path: Path
) -> None:
    """Another check, whose times differ by chance, changes nothing."""
    _, first = alone(tiny, tmp_path, H100_RANK)
    again = replace(H100_RANK, choices=Kernels(), passed={})
    _, second = alone(tiny, tmp_path, again, "deterministic=true")
    assert second.kernels == first.kernels and second.kernels.attention == TRITON
    assert second.lines == ()


BROKEN_RANK = replace(
    H100_RANK,
    choices=replace(H100_RANK.choices, attention=Choice("eager", {}, "no compiler")),
    passed={name: blocks for name, blocks in H100_RANK.passed.items() if name != "attention"},
    refused={"attention": {"triton": "no compiler"}},
)
"""The H100, on a host where the attention's kernel fails."""


def test_a_resume_drops_a_kernel_that_fails_the_check(tiny: Path, tmp_path: Path) -> None:
    alone(tiny, tmp_path, H100_RANK)
    with pytest.raises(PreflightError, match=r"no compiler; .*with deterministic = true"):
        alone(tiny, tmp_path, BROKEN_RANK, "deterministic=true")
    _, second = alone(tiny, tmp_path, BROKEN_RANK)
    assert second.kernels == replace(H100_RANK.choices, attention=Choice())
    failure, change = second.lines
    assert failure.startswith(
        "kernels: triton, which the run had for attention, fails the check on NVIDIA H100 80GB HBM3"
    )
    assert failure.endswith(": no compiler")
    assert "last start: attention is eager and was triton; results go on within" in change
    assert alone(tiny, tmp_path, BROKEN_RANK)[1].lines == ()


def test_a_resume_takes_up_a_kernel_that_passes_now(tiny: Path, tmp_path: Path) -> None:
    alone(tiny, tmp_path, BROKEN_RANK)
    assert alone(tiny, tmp_path, H100_RANK, "deterministic=true")[1].lines == ()
    _, second = alone(tiny, tmp_path, H100_RANK)
    assert second.kernels == H100_RANK.choices
    (line,) = second.lines
    assert "last start: attention is triton and was eager; results go on within rounding" in line
    assert alone(tiny, tmp_path, H100_RANK)[1].lines == ()


def test_verdicts_have_the_reasons_of_what_they_refused(tiny: Path) -> None:
    verdicts = {
        "norms": Verdict("norms", False, "wrong", "compile", milliseconds={"compile": 1.0}),
        "syrk": Verdict("syrk", True, "fast", "triton", refused={"quack": "not installed"}),
    }
    local = LocalVerdicts(H100, "a" * 64, verdicts)
    one = RankKernels.of(load_config(tiny), torch.device("cpu"), local)
    assert one.refused == {"norms": {"triton": "wrong"}, "syrk": {"quack": "not installed"}}


def test_a_resume_with_other_kernels_logs_it_once(tiny: Path, tmp_path: Path) -> None:
    alone(tiny, tmp_path, H100_RANK)
    _, second = alone(tiny, tmp_path, A100_RANK)
    assert second.lines == (
        "kernels changed since the run's last start: attention is eager and was triton; compressor "
        "is triton and was eager; norms is eager and was triton; swiglu has other block sizes; "
        "syrk is eager and was triton; results go on within rounding, not to the bit",
    )
    assert alone(tiny, tmp_path, A100_RANK)[1].lines == ()


def test_a_run_from_before_the_file_ran_no_triton(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    cpu = RankKernels(Platform("cpu"))
    assert alone(tiny, tmp_path, cpu, "deterministic=true")[1].lines == ()
    (tmp_path / KERNELS_FILE).unlink()
    (line,) = alone(tiny, tmp_path, H100_RANK)[1].lines
    assert "attention is triton and was eager; syrk is triton and was eager; results go on" in line


def test_a_deterministic_run_keeps_its_kernels_or_is_refused(tiny: Path, tmp_path: Path) -> None:
    alone(tiny, tmp_path, H100_RANK)
    before = (tmp_path / KERNELS_FILE).read_bytes()
    with pytest.raises(PreflightError, match=r"attention is eager and was triton; .*deterministic"):
        alone(tiny, tmp_path, A100_RANK, "deterministic=true")
    assert (tmp_path / KERNELS_FILE).read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", '{"setting": "auto", "kinds": {"cpu": 3}}', "name"])
def test_a_damaged_file_is_replaced_with_a_line(tiny: Path, tmp_path: Path, text: str) -> None:
    alone(tiny, tmp_path, H100_RANK)
    path = tmp_path / KERNELS_FILE
    damaged = text
    if text == "name":
        damaged = path.read_text().replace('"triton"', '"os.system"')
    path.write_text(damaged)
    warnings, result = alone(tiny, tmp_path, H100_RANK)
    assert warnings == [f"{path} is damaged: kernels are chosen again, as for a new run"]
    assert json.loads(path.read_text())["setting"] == "auto" and result.lines == ()


def test_a_run_that_moves_to_another_device_logs_it(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)  # it would stay
    run = tmp_path / "run"
    arguments = [f"run_dir={run}", "metrics.wandb.mode=disabled"]
    assert main([str(tiny), *arguments, "steps=2"]) == 0
    assert "kernels changed" not in capsys.readouterr().out
    pinned = json.loads((run / KERNELS_FILE).read_text())
    assert pinned["kinds"]["cpu"]["choices"]["attention"]["name"] == "eager"
    pinned["kinds"] = {H100.label: pinned["kinds"].pop("cpu")}  # as if it came from a GPU
    pinned["kinds"][H100.label]["choices"]["attention"]["name"] = "triton"
    (run / KERNELS_FILE).write_text(json.dumps(pinned))
    assert main([str(run), "steps=3"]) == 0
    assert (
        "kernels changed since the run's last start: attention is eager and was triton; results go "
        "on within rounding, not to the bit\n"
    ) in capsys.readouterr().out
    pinned["kinds"][H100.label]["choices"]["norms"]["name"] = "triton"
    (run / KERNELS_FILE).write_text(json.dumps(pinned))
    assert main([str(run), "steps=4", "deterministic=true"]) == 2
    assert "with deterministic = true a run keeps its kernels" in capsys.readouterr().err
    assert json.loads((run / KERNELS_FILE).read_text()) == pinned


def test_triton_on_a_cpu_is_one_sentence_before_the_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny), f"run_dir={tmp_path / 'run'}", "metrics.wandb.mode=disabled"]
    assert main([*arguments, "kernels=triton"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "kernels = triton: attention: Triton runs on a GPU or in its interpreter" in error
    assert main([*arguments, "kernels.norms=triton"]) == 2
    assert "kernels.norms = triton: Triton runs on a GPU" in capsys.readouterr().err
