"""Runs with `compile` compared with runs without: the same training, resumed and divided like any.

Rows are packed differently in every step, so that numbers of entries and of experts' rows change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data import Loader
from tests.trainer.parallel.close_calls import recorded_gaps
from tests.trainer.parallel.topologies import (
    Job,
    assert_trains_like,
    outcome,
    run_all,
    topology,
)
from tests.trainer.tiny import assert_same_run
from trainer.__main__ import main
from trainer.build import build_native
from trainer.config import load_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid
from trainer.planning.activations import Live, Storages
from trainer.planning.dry_run import count_memory
from trainer.preflight import is_compiled, missing_compiler

PLAIN = topology(1)
COMPILED = topology(1, "kernels=compile")
SPREAD = [
    topology(2, "kernels=compile", "parallel.recompute=[block]"),
    topology(2, "kernels=compile", "parallel.recompute=[streams, norms, attention]", tensor=2),
]
PROGRAMS = 7
"""Of norms two, of the activation one with and one without weights, of streams read one, written
two: no size, packing or mode has another."""
STOP_AT = 4


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of one rank, and in `programs` how many programs the compiled two made."""
    folder = tmp_path_factory.mktemp("compiled")
    with recorded_gaps() as gaps:
        run_all(tiny, [Job(PLAIN, folder / "plain")])
    assert gaps.router > 1e-5 and gaps.index > 1e-5, vars(gaps)  # see close_calls.py
    torch._dynamo.reset()  # of programs that other tests of this process made
    made, programs = torch._dynamo.utils.counters["stats"], []
    before = made["unique_graphs"]
    for jobs in (
        [Job(COMPILED, folder / "compiled")],
        [Job(COMPILED, folder / "resumed", STOP_AT), Job(COMPILED, folder / "resumed")],
    ):
        run_all(tiny, jobs)
        programs.append(made["unique_graphs"] - before)
    (folder / "programs").write_text(f"{programs[0]} {programs[1]}")
    return folder


def test_it_trains_as_without(folder: Path) -> None:
    one, other = (outcome(folder / name) for name in ("plain", "compiled"))
    assert_trains_like(one, other, "compiled")
    weights = one.weights.keys() & other.weights.keys()
    assert any(not torch.equal(one.weights[n], other.weights[n]) for n in weights), "not compiled"


def test_a_run_makes_its_programs_once(folder: Path) -> None:
    first, second = (int(word) for word in (folder / "programs").read_text().split())
    assert first == second == PROGRAMS


def test_resumed_it_is_the_same_to_the_bit(folder: Path) -> None:
    assert_same_run(folder / "compiled", folder / "resumed", 10)


@pytest.mark.slow
@pytest.mark.parametrize("way", SPREAD, ids=lambda way: way.name)
def test_ranks_train_as_one(folder: Path, tiny: Path, tmp_path: Path, way) -> None:
    run_all(tiny, [Job(way, tmp_path)])
    assert_trains_like(outcome(folder / "compiled"), outcome(tmp_path), way.name)


def test_no_compiler_is_a_sentence_before_the_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny), f"run_dir={tmp_path / 'run'}", "kernels=compile"]
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "kernels = compile needs a C++ compiler (g++, or what CXX names)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_opens_a_run_alone_needs_no_compiler(tiny: Path) -> None:
    config = load_config(tiny, ["kernels=compile"])
    assert is_compiled(config) and not is_compiled(config.alone())


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_compiler(torch.device("cuda")) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_compiler(torch.device("cuda")) == "triton for a GPU"


def test_memory_is_expected_as_it_is_held(tiny: Path) -> None:
    """Programs as they stand hold the same for backward, and while they run no less."""
    config = load_config(tiny, ["kernels=compile", "model.hidden_size=128"])
    expects = count_memory(config, 1).fullest
    local, optimizer = build_native(config, Grid.single())
    engine = NativeEngine(local, Grid.single(), optimizer)
    batches = Loader(config.data, config.seed, 0, 1).at(0)
    with torch.compiler.set_stance("force_eager"):
        engine.forward_backward(batches)
        known = [*local.model.parameters(), *local.model.buffers()]
        known += [p.grad for p in local.model.parameters() if p.grad is not None]
        with Live(Storages(known)) as live:
            engine.forward_backward(batches)
    passes = expects.microbatches + expects.activations + expects.workspace
    assert passes == pytest.approx(live.peak, rel=0.1)  # as in test_memory.py
