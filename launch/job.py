"""A job for a cluster: the cluster file's sections, and what is to run where."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from launch.processes import RESTART_ENVIRONMENT
from trainer.config import ConfigError, RunConfig, Section, UserPath

Word = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_.,:;/@%=+*\[\]()-]+$",
        description="letters, digits and `_.,:;/@%=+*[]()-`",
    ),
]
DnsName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        description="lower-case letters, digits, and `.-` inside",
    ),
]
# Where networks, caches and the wandb server are; nothing that changes what is computed.
ALLOWED_VARIABLE = re.compile(
    r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI|HF|WANDB|XDG|TRITON_CACHE|https?_proxy|no_proxy)(_[A-Z0-9_]+)?$"
)
PASSWORD_IN_URL = re.compile(r"(//|:)[^/?#]*@")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL")


class SlurmConfig(Section):
    """Slurm's own settings."""

    partition: Word | None = None
    """Partition; null is the cluster's default."""
    account: Word | None = None
    """Account that is charged."""
    qos: Word | None = None
    """Quality of service."""
    time: Annotated[
        str,
        Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$", description="a time of sbatch"),
    ] = "24:00:00"
    """Time limit of one job, in sbatch's notation; a job that reaches it is requeued."""
    cpus_per_node: PositiveInt | None = None
    """CPU cores per node; null is Slurm's default. [cores]"""
    exclusive: bool = True
    """Whether nodes are not shared with other jobs."""
    options: tuple[Word, ...] = ()
    """Further sbatch options, such as `--constraint=ib`."""
    setup: tuple[str, ...] = ()
    """Shell lines before the start, such as `module load cuda`."""
    container: Word | None = None
    """Image for pyxis' `srun --container-image`; null runs on the node itself."""
    container_mounts: tuple[Word, ...] = ()
    """Mounts of the image, `SOURCE:TARGET`."""


class SecretConfig(Section):
    """A key in a Kubernetes Secret, by name; the value is never read here."""

    name: DnsName
    """Name of the Secret."""
    key: Word
    """Key within the Secret."""


class KubernetesConfig(Section):
    """Kubernetes' own settings."""

    job: Literal["PyTorchJob", "TrainJob"] = "PyTorchJob"
    """Kind of job: `PyTorchJob` of Kubeflow's training operator (v1), or `TrainJob` of Kubeflow
    Trainer (v2)."""
    image: Word
    """Image with this project installed."""
    namespace: DnsName | None = None
    """Namespace; null is that of the kubectl context."""
    claim: DnsName
    """PersistentVolumeClaim, ReadWriteMany, for run folders and data."""
    mount: Path
    """Where the claim is mounted in every pod."""
    cpu: Word | None = None
    """CPU limit of a pod, such as `64`."""
    memory: Word | None = None
    """Memory limit of a pod, such as `512Gi`."""
    shared_memory: Word = "64Gi"
    """Size of /dev/shm."""
    gpu_resource: Word = "nvidia.com/gpu"
    """Resource name of a GPU."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that nodes must have."""
    wandb_secret: SecretConfig | None = None
    """The Secret that WANDB_API_KEY comes from; without one, wandb works offline."""
    backoff_limit: NonNegativeInt = 20
    """Pod failures before the job is marked as failed. [failures]"""


class ClusterConfig(Section):
    """A cluster file, `configs/clusters/*.yaml`."""

    kind: Literal["slurm", "kubernetes"]
    """Cluster manager."""
    folder: UserPath = Path(".")
    """The working directory on every node, to which paths in the run's config are relative."""
    python: Word = "python"
    """The interpreter; relative to `folder` when it has a slash."""
    gpus: bool = True
    """Whether a process needs a GPU; false trains on CPUs. It becomes the run's `device` where that
    is auto."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    """Port of the rendezvous on the first node."""
    max_restarts: NonNegativeInt = 3
    """Restarts of the training processes before a node gives up. [restarts]"""
    join_seconds: PositiveInt = 1200
    """How long the rendezvous waits for a node that is late or was replaced. [seconds]"""
    save_seconds: PositiveInt = 300
    """Time for a last checkpoint between the warning and the end of a job. [seconds]"""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables about networks and caches, such as NCCL_SOCKET_IFNAME. Never a secret."""
    slurm: SlurmConfig | None = None
    """Settings for `kind: slurm`."""
    kubernetes: KubernetesConfig | None = None
    """Settings for `kind: kubernetes`."""

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        """`environment` has variables of networks, caches or proxies, and no secrets."""
        for name, text in value.items():
            if SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret, which no file should contain; set it where the "
                    "job is submitted, or name a secret in kubernetes.wandb_secret"
                )
            if PASSWORD_IN_URL.search(text):
                raise ValueError(
                    f"{name} has a user or a password before an @, which no file should contain; "
                    "set it where the job is submitted"
                )
            if not ALLOWED_VARIABLE.match(name):
                raise ValueError(
                    f"{name} is not about networks or caches, and no variable may change what is "
                    "computed; it should begin with NCCL_, TORCH_NCCL_, GLOO_, UCX_, FI_, HF_, "
                    "WANDB_, XDG_ or TRITON_CACHE_, or name a proxy"
                )
        return value

    @model_validator(mode="after")
    def _has_section_of_kind(self) -> "ClusterConfig":
        """The section of `kind` is there, and no other: `slurm` or `kubernetes`."""
        other = "kubernetes" if self.kind == "slurm" else "slurm"
        if getattr(self, self.kind) is None:
            raise ValueError(f"kind = {self.kind} needs the section {self.kind}")
        if getattr(self, other) is not None:
            raise ValueError(f"kind = {self.kind} should have no section {other}")
        return self


class Nodes(NamedTuple):
    """Node counts at which a job may run: one, or all from `low` to `high`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Nodes":
        """Reads `N` or `MIN:MAX`, as torchrun's `--nnodes`. Raises ConfigError."""
        match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
        if match is None or (nodes := cls(int(match[1]), int(match[2] or match[1]))).is_empty:
            raise ConfigError(
                f"--nodes = {text} should be a number of nodes, or MIN:MAX with MIN <= MAX"
            )
        return nodes

    @property
    def is_empty(self) -> bool:
        """Whether there is no such count."""
        return self.low > self.high

    @property
    def is_range(self) -> bool:
        """Whether there are several such counts."""
        return self.low < self.high

    def __str__(self) -> str:
        return f"{self.low}:{self.high}" if self.is_range else str(self.low)


def job_name(folder: str) -> str:
    """Returns `v4-` and the name of a folder, in characters that both managers accept."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")
    return f"v4-{name}"[:40].rstrip("-")


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        arguments: those of `python -m trainer`.
        out: folder of the job file and the logs.
    """

    run: RunConfig
    arguments: tuple[str, ...]
    cluster: ClusterConfig
    nodes: Nodes
    processes_per_node: int
    out: Path

    @property
    def name(self) -> str:
        """`v4-` and the run folder's name."""
        return job_name(self.run.run_dir.name)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process."""
        return RESTART_ENVIRONMENT | self.cluster.environment

    def torchrun(self, nodes: str, endpoint: str, job_id: str, is_host: str) -> list[str]:
        """Returns the command without training's arguments; the parameters are shell text.

        Ours ends with the exit code of the rank that failed, torch's own with 1.
        """
        cluster = self.cluster
        return [
            f"{cluster.python} -m trainer.process.torchrun",
            f"--nnodes {nodes} --nproc-per-node {self.processes_per_node}",
            f"--rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id {job_id}",
            f"--rdzv-conf is_host={is_host},join_timeout={cluster.join_seconds}",
            f"--max-restarts {cluster.max_restarts} --shutdown-timeout {cluster.save_seconds}",
            "-m trainer",
        ]
