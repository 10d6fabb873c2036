"""Writes the file of a job, or of a sweep, for Slurm or Kubernetes."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from data.activity import print_line
from data.files import write_atomically
from launch import kubernetes, slurm
from launch.job import ClusterConfig, Job, Nodes, job_name
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
    nodes: Nodes,
    gpus_per_node: int,
    out: Path,
) -> Path:
    """Writes the job file for the cluster manager atomically and returns its path.

    A file of another job, or one that was edited, is kept under another name.

    Arguments:
        gpus_per_node: and processes on each node; 0 is one process on the CPUs of each.

    Raises ConfigError when the run does not fit one of the numbers of processes or has no GPU for
    `device: cuda`, and DataError when `out` cannot be written.
    """
    if gpus_per_node == 0:
        cluster = cluster.model_copy(update={"gpus": False})
    if run.device == "cuda" and not cluster.gpus:
        raise ConfigError(
            "device = cuda needs GPUs, and the job has none; it should be auto or cpu, or "
            "--gpus-per-node above 0 and gpus in the cluster file true"
        )
    processes_per_node = max(gpus_per_node, 1)
    for number in range(nodes.low, nodes.high + 1):
        try:
            run.check_world(number * processes_per_node)
        except ConfigError as error:
            where = f"{number} of --nodes {nodes}: " if nodes.is_range else ""
            raise ConfigError(f"{where}{error}") from None
    if run.device == "auto":  # a node without its GPUs is an error, not a rank on a CPU
        arguments = [*arguments, f"device={'cuda' if cluster.gpus else 'cpu'}"]
    job = Job(run, tuple(arguments), cluster, nodes, processes_per_node, out.absolute())
    if cluster.kind == "slurm":
        name, text = "train.sbatch", slurm.script(job)
    else:
        assert cluster.kubernetes is not None
        name = f"{cluster.kubernetes.job.lower()}.yaml"
        text = kubernetes.manifest(job)
    path = out / name
    _write_job_file(path, text)
    return path


def write_sweep_job(
    cluster: ClusterConfig, command: str, arguments: Sequence[str], jobs: int, folder: Path
) -> Path:
    """Writes `sweep.sbatch` into a sweep's folder, as `write_job` does, and returns its path.

    Arguments:
        command: what each of the array's `jobs` runs: options of Python, shell text.
        arguments: of that command.

    Raises ConfigError for a cluster other than Slurm.
    """
    if cluster.kind != "slurm":
        raise ConfigError(f"kind = {cluster.kind}: a sweep is an array of Slurm's jobs; kind slurm")
    path = folder / "sweep.sbatch"
    name = job_name(folder.name)
    text = slurm.array_script(cluster, name, command, arguments, jobs, folder.absolute())
    _write_job_file(path, text)
    return path


def _write_job_file(path: Path, text: str) -> None:
    """Writes a job file; one that is there with another text is kept under another name."""
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != text:
        names = (path.with_name(f"{path.name}.{i}") for i in count(1))
        copy = next(name for name in names if not name.exists())
        write_atomically(copy, before)
        print_line(f"{path} was another job, or edited; it is kept as {copy}")
    write_atomically(path, text)
