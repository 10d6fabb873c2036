"""Profiles of steps that the config names, or that a signal asks for."""

import gzip
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import spawn
from tests.trainer.tiny import assert_same_run, train
from trainer.config import ConfigError, load_config
from trainer.parallel.grid import Grid
from trainer.process.signals import ProfileRequest, profile_on_signal
from trainer.profiling import Profiler
from trainer.trainer import Trainer


def files(run_dir: Path) -> dict[str, list[str]]:
    """Names of the files of each profile."""
    return {
        folder.name: sorted(file.name for file in folder.iterdir())
        for folder in sorted((run_dir / "profiles").glob("*"))
    }


def of(rank: int) -> list[str]:
    return [f"rank-{rank:05d}.operations.txt", f"rank-{rank:05d}.trace.json.gz"]


def test_the_steps_of_the_config_are_profiled_and_nothing_else_changes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "plain")
    train(tiny, tmp_path / "run", "profile.steps=[3, 4]")
    folder = tmp_path / "run" / "profiles" / "steps-00000003-00000004"
    assert files(tmp_path / "run") == {folder.name: of(0)}
    trace = json.loads(gzip.decompress((folder / of(0)[1]).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#HybridZero.step") in (0, 2) and "aten::mm" in names
    table = (folder / of(0)[0]).read_text()
    assert "Self CPU" in table and "Input Shapes" in table
    assert sum(line.lstrip().startswith("aten::") for line in table.splitlines()) <= 10
    assert f"profile: {folder}; without a memory snapshot" in capsys.readouterr().out
    assert not files(tmp_path / "plain")
    assert_same_run(tmp_path / "plain", tmp_path / "run", 6)


def test_a_signal_asks_for_the_next_steps(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}", "profile.steps_on_signal=2"])
    with profile_on_signal() as request:
        trainer = Trainer(config, Grid.single(), profile=request)
        trainer.periodic.append(
            lambda state, _: state.step == 1 and os.kill(os.getpid(), signal.SIGUSR1)
        )
        trainer.run()
    assert files(tmp_path / "run") == {"steps-00000003-00000004": of(0)}


def asked(rank: int, world_size: int, path: Path, run_dir: Path) -> None:
    config = load_config(path, [f"run_dir={run_dir}", "profile.ranks=[1, 2]"])
    trainer = Trainer(config, Grid.build(config.degrees(world_size), torch.device("cpu")))
    if rank == 0:
        trainer.periodic.append(lambda state, _: state.step == 4 and trainer.profile.request())
    trainer.run()


def test_one_rank_is_asked_and_those_of_the_config_write(tiny: Path, tmp_path: Path) -> None:
    """A profile that would go beyond the run ends with it."""
    spawn(asked, 3, tiny, tmp_path / "run")
    expected = sorted([*of(1), *of(2)])
    assert files(tmp_path / "run") == {"steps-00000006-00000008": expected}


def test_a_profile_that_cannot_be_written_ends_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with patch("trainer.profiling.write_whole", full):
        train(tiny, tmp_path / "run", "profile.steps=[3, 4]")
    assert "v4: warning: no profile of rank 0: No space left" in capsys.readouterr().err


def test_the_recording_of_memory_ends_with_a_table_that_cannot_be_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny, [f"run_dir={tmp_path}", "profile.steps=[1, 1]"])
    (tmp_path / "profiles/steps-00000001-00000001/rank-00000.operations.txt").mkdir(parents=True)
    profiler = Profiler(config, Grid.single(), ProfileRequest(), print)
    with patch("torch.cuda.memory._record_memory_history") as record:
        profiler.before_step(1)
        profiler.grid = replace(Grid.single(), device=torch.device("cuda"))
        profiler.after_step(1)
    record.assert_called_once_with(enabled=None)
    assert "warning: no profile of rank 0: cannot write" in capsys.readouterr().err


def test_what_is_written_after_a_step_has_the_patience_of_a_file(
    tiny: Path, tmp_path: Path
) -> None:
    """A large trace takes minutes, and a file server may be away as long."""
    settings = [f"run_dir={tmp_path / 'run'}", "steps=4", "profile.steps=[2, 3]"]
    trainer, tasks = Trainer(load_config(tiny, settings), Grid.single()), []

    def record(*_: Any) -> None:
        tasks.append(trainer.heartbeat.task)

    with (
        patch("trainer.profiling.write_whole", record),
        patch("trainer.metrics.Metrics.write", record),
    ):
        trainer.run()
    assert tasks == ["metrics"] * 5, "four lines of metrics and a trace"


def test_a_resume_behind_the_steps_is_logged(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "run", stop_at=4)
    train(tiny, tmp_path / "run", "profile.steps=[3, 4]")
    assert "profile.steps = [3, 4]: the run is at step 5 already" in capsys.readouterr().out
    assert not files(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("profile.steps=[5, 7]", "profile.steps = [5, 7] should be at most 6, the last step"),
        ("profile.steps=[5, 4]", "should have the first step before the last"),
        ("profile.steps=[0, 4]", "profile.steps.0"),
        ("profile.steps=[4]", "profile.steps"),
    ],
)
def test_steps_beyond_the_run_are_refused(tiny: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tiny, [override])
    assert sentence in str(error.value)


def test_ranks_beyond_the_processes_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile.ranks has 2, and the last rank is 1"):
        load_config(tiny, ["profile.ranks=[0, 2]"]).check_world(2)
    load_config(tiny, ["profile.ranks=[0, 2]"]).alone().check_world(1)
