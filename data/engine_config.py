"""Settings of the engines of `v4 data prepare`."""

from pydantic import Field

from data.section import Section


class PrepareSlurmConfig(Section):
    """The jobs of `v4 data prepare` where `data.engine` is slurm."""

    partition: str | None = None
    """Null: the cluster's default."""
    qos: str | None = None
    """Quality of service; null: the default of the account."""
    time: str | None = None
    """Limit of a job, as sbatch takes it; null: the partition's default."""
    cpus_per_job: int = Field(default=1, ge=1, le=1024)
    """Cores of a job, which tokenises with all of them. [cores]"""
    gigabytes_per_cpu: int = Field(default=4, ge=1, le=4096)
    """Memory of a job by its cores. [GiB]"""
    options: dict[str, str] = Field(default={})
    """Other options of sbatch without their dashes, such as `account`."""
    setup: str | None = None
    """Shell commands before Python starts, such as `module load`; null: none."""


class PrepareRayConfig(Section):
    """The cluster of `v4 data prepare` where `data.engine` is ray."""

    address: str | None = Field(
        default=None,
        pattern=r"^([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$",
        description="HOST:PORT",
    )
    """Address of its head, as HOST:PORT; null: the cluster that this host belongs to."""
