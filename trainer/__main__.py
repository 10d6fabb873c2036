"""`python -m trainer CONFIG [key=value ...]`: trains, alone or as one process of torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from data.activity import Activity, prepare_streams, print_line
from trainer.process.exit_codes import START_AGAIN
from trainer.process.signals import (
    ProfileRequest,
    StopRequest,
    end_on_signals,
    profile_on_signal,
    stop_on_signals,
)

if TYPE_CHECKING:
    from trainer.config import RunConfig


def train(config: RunConfig, stop: StopRequest, profile: ProfileRequest) -> bool:
    """Trains `config` on the processes that torchrun's environment describes.

    Returns whether processes have to begin again, for a next step with other degrees.

    The first of them logs a line at once: torch and what follows take seconds to import.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    if config.is_complete:
        if is_first:
            from trainer.checkpoint import check_sizes

            check_sizes(config.last_checkpoint)
            print_line(
                f"{config.run_dir}: complete, with {config.recipe.steps} of "
                f"{config.recipe.steps} steps; to train on, set more steps"
            )
        return False
    if is_first:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        print_line(
            f"{config.run_dir}: {config.recipe.steps} steps on {processes} process"
            f"{'es' * (processes > 1)}; loading torch"
        )
    allow_growing_segments()
    with Activity("loading torch", visible=is_first):
        from trainer.checkpoint import at_next_step, claim_checkpoints
        from trainer.kernels import RankKernels, local_verdicts
        from trainer.parallel.collectives import all_gather_objects
        from trainer.parallel.grid import connect_store, open_grid
        from trainer.planning import (
            advise_on_out_of_memory,
            expected_memory_report,
            fit_to_device,
            host_memory_warning,
        )
        from trainer.preflight import preflight
        from trainer.process.failures import report_failures
        from trainer.process.heartbeat import Heartbeat
        from trainer.process.lease import leases_on
        from trainer.process.local_device import local_device
        from trainer.process.watchdog import Watchdog
        from trainer.save_mode import choose_save_mode
        from trainer.trainer import Trainer

    with (
        report_failures() as watch,
        ExitStack() as opened,
        Activity("connecting", visible=is_first) as start,
    ):
        device = local_device(config.device)
        timeout = config.parallel.timeout_seconds
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
        heartbeat.follow(grid.traffic.waits, config.parallel.timeout_on(device.type))
        opened.enter_context(Watchdog(config.watchdog, heartbeat, config.run_dir, watch))
        if config.deterministic:
            _use_deterministic_algorithms()
        with leases_on(config.written_folders, "v4 train", grid, watch, stop) as check:
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
            if is_first:
                claim_checkpoints(config)
            saves = choose_save_mode(config, grid)
            messages += [expected_memory_report(config, grid.world_size), saves.message]
            start.what = "opening the shards and building the model"
            with advise_on_out_of_memory(config, grid):
                trainer = Trainer(
                    config,
                    grid,
                    stop,
                    messages,
                    check,
                    agreed,
                    saves.is_async,
                    heartbeat,
                    profile,
                )
                watch.at_end.insert(0, trainer.checkpoint.wait_at_end)  # before the lease ends
                start.end()
                state = trainer.run()
        watch.close()
    return state.starts_again


def _use_deterministic_algorithms() -> None:
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only GPUs read it
    torch.use_deterministic_algorithms(True)


def allow_growing_segments() -> None:
    """Lets the allocator of GPU memory grow its segments, unless the user configured it.

    The sizes of tensors follow from the packing of every step; segments of fixed sizes would leave
    gaps among them. torch reads the first of the variables that is set when it is imported.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 at the end or after a signal, 2 after one line about bad input.

    Several processes end with `START_AGAIN` where the next step has other degrees; one process goes
    on by itself.
    """
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", help="config file, or the folder of a run to resume")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    # Before anything is imported that takes long, so that no signal is lost.
    with stop_on_signals() as stop, profile_on_signal() as profile:
        from trainer.config import load_run
        from trainer.process.errors import run_or_explain

        def run() -> int:
            while train(load_run(options.config, options.overrides), stop, profile):
                if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    return START_AGAIN
            return 0

        return run_or_explain(run)


if __name__ == "__main__":
    sys.exit(main())
