"""A training on its processes, from their connection to the last step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch

from data.activity import Activity, print_line
from trainer.checkpoint import at_next_step, claim_checkpoints, put_back
from trainer.config import RunConfig
from trainer.generate.load import read_model
from trainer.kernels import RankKernels, local_verdicts
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid, connect_store, open_grid
from trainer.planning import (
    advise_on_out_of_memory,
    expected_memory_report,
    fit_to_device,
    host_memory_warning,
)
from trainer.preflight import preflight
from trainer.process.failures import FailureWatch, report_failures
from trainer.process.heartbeat import Heartbeat
from trainer.process.lease import leases_on
from trainer.process.local_device import local_device
from trainer.process.signals import ProfileRequest, StopRequest, end_on_signals
from trainer.process.watchdog import Watchdog
from trainer.save_mode import choose_save_mode
from trainer.state import TrainState
from trainer.trainer import Trainer


def train_together(config: RunConfig, stop: StopRequest, profile: ProfileRequest) -> bool:
    """Trains `config` on the processes that torchrun's environment describes.

    Returns whether processes have to begin again, for a next step with other degrees.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    timeout = config.parallel.timeout_seconds
    with (
        report_failures() as watch,
        ExitStack() as opened,
        Activity("connecting", visible=is_first) as start,
    ):
        device = local_device(config.device)
        with end_on_signals(stop, "connecting to the other processes"):
            store = connect_store(timeout)
            config = at_next_step(config, store)
        config, messages = fit_to_device(config, device)  # before there is a process group
        if is_first and (warning := host_memory_warning(config, device)):
            print_line(f"warning: {warning}")
        verdicts = local_verdicts(config, device, start, lambda: stop.requested)
        kernels = RankKernels.of(config, device, verdicts)
        start.what = "connecting"
        with end_on_signals(stop, "connecting to the other processes"):
            grid = opened.enter_context(open_grid(device, config.degrees, timeout, store))
            watch.connect(grid)
        heartbeat = Heartbeat()
        heartbeat.follow(grid.traffic.waits, config.parallel.collective_timeout)
        opened.enter_context(Watchdog(config.watchdog, heartbeat, config.run_dir, watch))
        if config.deterministic:
            _use_deterministic_algorithms()
        with leases_on(config.written_folders, "v4 train", grid, watch, stop) as leases:
            start.what = "comparing all processes"
            warnings, agreed = preflight(config, grid, kernels)
            for warning in warnings:
                if is_first:
                    print_line(f"warning: {warning}")
            if any(all_gather_objects(stop.requested, grid.world)):
                if is_first:
                    print_line("stopped before the first step")
                watch.close()
                return False
            make_trainer = partial(
                Trainer,
                config,
                grid,
                stop,
                leases=leases,
                kernels=agreed,
                heartbeat=heartbeat,
                profile=profile,
                read_model=read_model,
            )
            state = _run(config, grid, make_trainer, messages, watch, start)
        watch.close()
    return state.starts_again


def _run(
    config: RunConfig,
    grid: Grid,
    make_trainer: Callable[..., Trainer],
    messages: list[str],
    watch: FailureWatch,
    start: Activity,
) -> TrainState:
    """Makes the trainer and runs it; returns the state in which it ended.

    `make_trainer` takes the `messages` and whether checkpoints are written beside training.
    """
    if grid.is_first:
        claim_checkpoints(config)
        put_back(config.checkpoints)
    saves = choose_save_mode(config, grid)
    messages = [*messages, expected_memory_report(config, grid.world_size), saves.message]
    start.what = "opening the shards and building the model"
    with advise_on_out_of_memory(config, grid):
        trainer = make_trainer(messages=messages, async_saves=saves.is_async)
        watch.at_end.insert(0, trainer.checkpoint.wait_at_end)  # before the lease ends
        start.end()
        return trainer.run()


def _use_deterministic_algorithms() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only GPUs read it
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor, by a launch each on a GPU and by the host where page-locked.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
