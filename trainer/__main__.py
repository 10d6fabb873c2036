"""`python -m trainer CONFIG [key=value ...]`: trains, alone or as one process of torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.activity import Activity, prepare_streams, print_line
from trainer.process.exit_codes import START_AGAIN
from trainer.process.signals import (
    ProfileRequest,
    StopRequest,
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
        from trainer.session import train_together

    return train_together(config, stop, profile)


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
