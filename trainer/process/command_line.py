"""Commands in messages, as they can be pasted into the shell that started this process."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

BORDERS = "V4_BORDERS"
"""Variable for messages: how often ranks were started again with other degrees, which torchrun's
number of restarts includes."""


def v4(*arguments: str | Path) -> str:
    """Returns a command of this installation; `v4` by its path where PATH has none, or another."""
    script = Path(sys.executable).with_name("v4")
    on_path = shutil.which("v4")
    if on_path is not None and Path(on_path).resolve() == script.resolve():
        program = ["v4"]
    else:
        program = [str(script)] if script.is_file() else [sys.executable, "-m", "launch"]
    return shlex.join([*program, *map(str, arguments)])


def resume_command(run_dir: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Returns how to resume a run, with as many processes and restarts as it had.

    Everything else is in the run's config.yaml. `environment` is torchrun's, if it runs this.
    """
    if int(environment.get("GROUP_WORLD_SIZE", "1")) > 1:
        return f"start the same job, or the same command on every host, for {run_dir}"
    processes = int(environment.get("WORLD_SIZE", "1"))
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    restarts -= int(environment.get(BORDERS, "0"))
    options = [f"--nproc-per-node={processes}"] * (processes > 1)
    options += [f"--max-restarts={restarts}"] * (restarts > 0)
    return v4("train", run_dir, *options)
