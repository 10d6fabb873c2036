"""`python -m launch.trial CONFIG key=value ...`: trains one trial of a sweep in its own folder.

`wandb agent` gives every trial an id but the same command; the id becomes the run folder's name.
"""

import os
import sys
from pathlib import Path

from launch import processes
from trainer.process.exit_codes import USER_ERROR, error_line


def main(arguments: list[str]) -> int:
    """Replaces this process by the trainer, so that signals reach it directly."""
    if not any(word.startswith("run_dir=") for word in arguments):
        run_id = os.environ.get("WANDB_RUN_ID")
        if run_id is None:
            message = "a trial needs run_dir=FOLDER, or WANDB_RUN_ID as `wandb agent` sets it"
            print(error_line(message), file=sys.stderr)
            return USER_ERROR
        folder = Path("runs/sweeps", os.environ.get("WANDB_SWEEP_ID", "wandb"), run_id)
        arguments = [*arguments, f"run_dir={folder}"]
    command = processes.training_command(arguments, 1)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
