"""Writes a job for a cluster: `train.sbatch` or `pytorchjob.yaml`, torchrun on every node."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from data.activity import print_line
from data.files import write_atomically
from launch import kubernetes, slurm
from launch.job import ClusterConfig, Job
from trainer.config import RunConfig, load_as

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

    A file of another job, or one that was edited, is kept under another name.

    Raises ConfigError when the run does not fit the number of processes, and DataError when `out`
    cannot be written.
    """
    run.check_world(nodes * gpus_per_node)
    if run.device == "auto":  # a node without its GPUs is an error, not a rank on a CPU
        arguments = [*arguments, f"device={'cuda' if cluster.gpus else 'cpu'}"]
    job = Job(run, tuple(arguments), cluster, nodes, gpus_per_node, out.absolute())
    if cluster.kind == "slurm":
        name, text = "train.sbatch", slurm.script(job)
    else:
        name, text = "pytorchjob.yaml", kubernetes.manifest(job)
    path = out / name
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != text:
        copy = next(c for i in count(1) if not (c := out / f"{name}.{i}").exists())
        write_atomically(copy, before)
        print_line(f"{path} was another job, or edited; it is kept as {copy}")
    write_atomically(path, text)
    return path
