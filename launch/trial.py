"""`python -m launch.trial CONFIG key=value ...`: trains one trial of a sweep in its own folder.

`wandb agent` gives every trial an id but the same command; the id becomes the name of the run
folder, and of the trial's folder of checkpoints where `checkpoint.folder` is set.
"""

import json
import os
import sys
from pathlib import Path

from launch import processes
from trainer.config import ConfigError, RunConfig, load_config
from trainer.process.exit_codes import USER_ERROR, error_line


def own_folders(config: RunConfig, run_dir: Path, *names: str) -> list[str]:
    """Returns the overrides that give a trial its own folders.

    Arguments:
        names: of the trial's folder below `checkpoint.folder`, where the config sets that.
    """
    overrides = [f"run_dir={json.dumps(str(run_dir))}"]
    if config.checkpoint.folder is not None:
        place = "/".join([config.checkpoint.folder.rstrip("/"), *names])
        overrides.append(f"checkpoint.folder={json.dumps(place)}")
    return overrides


def main(arguments: list[str]) -> int:
    """Replaces this process by the trainer, so that signals reach it directly."""
    if arguments and not any(word.startswith("run_dir=") for word in arguments):
        run_id = os.environ.get("WANDB_RUN_ID")
        if run_id is None:
            message = "a trial needs run_dir=FOLDER, or WANDB_RUN_ID as `wandb agent` sets it"
            print(error_line(message), file=sys.stderr)
            return USER_ERROR
        sweep = os.environ.get("WANDB_SWEEP_ID", "wandb")
        try:
            config = load_config(arguments[0], arguments[1:])
        except ConfigError as error:
            print(error_line(str(error)), file=sys.stderr)
            return USER_ERROR
        folder = Path("runs/sweeps", sweep, run_id)
        arguments = [*arguments, *own_folders(config, folder, sweep, run_id)]
    command = processes.training_command(arguments, 1)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
