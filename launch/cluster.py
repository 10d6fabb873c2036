"""Writes a job for a cluster: `train.sbatch` or `pytorchjob.yaml`, torchrun on every node."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch import kubernetes, slurm
from launch.job import ClusterConfig, Job
from trainer.config import ConfigError, RunConfig, load_as

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "clusters"


def load_cluster(cluster: str) -> ClusterConfig:
    """Reads a cluster file, or the one in configs/clusters that `slurm` or `kubernetes` names.

    Raises ConfigError as for a run's config.
    """
    path = CONFIGS / f"{cluster}.yaml" if cluster in ("slurm", "kubernetes") else Path(cluster)
    return load_as(ClusterConfig, path)


def write_job(
    run: RunConfig,
    arguments: Sequence[str],
    cluster: ClusterConfig,
    nodes: int,
    gpus_per_node: int,
    out: Path,
) -> Path:
    """Writes the job file for the cluster manager atomically and returns its path.

    Raises ConfigError when the run does not fit the number of processes or `out` cannot be written.
    """
    run.check_world(nodes * gpus_per_node)
    job = Job(run, tuple(arguments), cluster, nodes, gpus_per_node, out.absolute())
    if cluster.kind == "slurm":
        name, text = "train.sbatch", slurm.script(job)
    else:
        name, text = "pytorchjob.yaml", kubernetes.manifest(job)
    try:
        return _write_whole(out / name, text)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def _write_whole(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path
