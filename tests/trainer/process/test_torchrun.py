"""Our torchrun: numbers of hosts that do not fit, and ranks whose end is not that of the job."""

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from trainer.config import ConfigError
from trainer.process import torchrun
from trainer.process.exit_codes import START_AGAIN, USER_ERROR


def words(nodes: str, config: Path, *overrides: str) -> list[str]:
    options = ["--nnodes", nodes, "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return [*options, "--rdzv-endpoint", "localhost:0", "-m", "trainer", str(config), *overrides]


def test_every_number_of_hosts_has_to_fit(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a rank is started."""
    bad = words("2:4", tiny, "parallel.tensor=2", "parallel.context=2")
    with pytest.raises(ConfigError) as caught:
        torchrun.check_sizes(bad)
    assert str(caught.value) == (
        "3 of --nnodes 2:4: parallel.tensor x context x pipeline = 4 does not divide the 6 "
        "processes; start 4 or 8 processes, or change these degrees"
    )
    assert torchrun.main(bad) == USER_ERROR
    assert capsys.readouterr().err.startswith("v4: error: 3 of --nnodes 2:4: parallel.tensor x")
    torchrun.check_sizes(words("1:2", tiny, "parallel.tensor=2"))
    torchrun.check_sizes(words("3", tiny, "parallel.tensor=4"))  # refused by the ranks themselves


def test_too_few_rows_for_the_most_hosts_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 of --nnodes 1:3: data\.global_batch_size = 4 sh"):
        torchrun.check_sizes(words("1:3", tiny))


@pytest.mark.parametrize(
    ("codes", "waiting", "state", "restarts"),
    [
        ((), 0, WorkerState.SUCCEEDED, (3, 1)),
        ((), 1, WorkerState.HEALTHY, (3, 1)),
        ((START_AGAIN,), 0, WorkerState.FAILED, (4, 2)),
        ((-15, START_AGAIN), 1, WorkerState.FAILED, (4, 2)),
        ((1,), 1, WorkerState.FAILED, (3, 1)),
    ],
)
def test_what_an_agent_makes_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch,
    codes: tuple[int, ...],
    waiting: int,
    state: WorkerState,
    restarts: tuple[int, int],
) -> None:
    """`restarts`: those allowed, and those left."""
    failures: dict[int, Any] = {n: SimpleNamespace(exitcode=x) for n, x in enumerate(codes)}
    result = RunResult(WorkerState.FAILED if codes else WorkerState.SUCCEEDED, {}, failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    monkeypatch.setattr(torchrun.Agent, "_wait_for_ends", lambda self: None)
    agent = torchrun.Agent.__new__(torchrun.Agent)
    agent._remaining_restarts, agent._pcontext = 1, None
    handler = SimpleNamespace(num_nodes_waiting=lambda: waiting)
    group: Any = SimpleNamespace(spec=SimpleNamespace(max_restarts=3, rdzv_handler=handler))
    monkeypatch.setenv(torchrun.BORDERS, "0")
    assert agent._monitor_workers(group).state == state
    assert (group.spec.max_restarts, agent._remaining_restarts) == restarts


def test_ranks_that_stop_for_a_new_host_have_the_time_of_a_save() -> None:
    closed: list[Any] = []
    agent = torchrun.Agent.__new__(torchrun.Agent)
    agent._shutdown_timeout = 300
    agent._worker_watchdog = agent._health_check_server = None
    agent._pcontext = cast(Any, SimpleNamespace(close=lambda *words: closed.append(words)))
    agent._stop_workers(cast(Any, None))
    assert closed == [(signal.SIGTERM, 300)]


@pytest.mark.parametrize(("code_before", "causes"), [(None, [1]), (-9, [0, 1])])
def test_a_rank_that_torchrun_has_killed_is_no_cause(
    monkeypatch: pytest.MonkeyPatch, code_before: int | None, causes: list[int]
) -> None:
    """As one that is stopped, and does not end at SIGTERM."""
    codes = {0: -9, 1: 1}
    failures: dict[int, Any] = {n: SimpleNamespace(exitcode=x, pid=n) for n, x in codes.items()}
    result = RunResult(WorkerState.FAILED, {}, failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    monkeypatch.setattr(torchrun.Agent, "_wait_for_ends", lambda self: None)
    polled = {0: code_before, 1: 1}
    ranks = [SimpleNamespace(pid=n, poll=partial(polled.get, n)) for n in codes]
    monkeypatch.setattr(torchrun.Agent, "_ranks", lambda self: ranks)
    agent = torchrun.Agent.__new__(torchrun.Agent)
    assert list(agent._monitor_workers(cast(Any, None)).failures) == causes
