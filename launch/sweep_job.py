"""`v4 sweep --cluster`: a sweep as an array of jobs that take trials from one study."""

from pathlib import Path

from launch.cluster import load_cluster, write_sweep_job
from launch.sweep import sweep_folder
from launch.sweep_definition import prepare_folder
from launch.sweep_file import load_sweep


def write_array(
    file: str, out: Path | None, jobs: int, seed: int, cluster: str, wandb_agent: str | None
) -> Path:
    """Writes `sweep.sbatch` into the sweep's folder and returns its path.

    Arguments:
        jobs: size of the array, whose jobs each run one trial at a time.
        wandb_agent: ENTITY/PROJECT/ID of a sweep on wandb's server, which chooses the trials then.

    Raises ConfigError before anything is written for a file that cannot be used.
    """
    sweep = load_sweep(file)
    settings = load_cluster(cluster)
    folder = sweep_folder(file, out)
    if wandb_agent is not None:
        command = f"-m wandb agent --forward-signals --term-timeout {settings.save_seconds}"
        return write_sweep_job(settings, command, [wandb_agent], jobs, folder)
    prepare_folder(sweep, folder, seed)
    command = '-m launch sweep --call "$SLURM_ARRAY_JOB_ID"'
    arguments = [str(Path(file).absolute()), f"--out={folder.absolute()}", f"--seed={seed}"]
    return write_sweep_job(settings, command, arguments, jobs, folder)
