"""The sbatch script of a job.

Slurm sends SIGTERM to the batch shell some time before the limit. The shell has Slurm signal the
shells on all nodes. These send SIGTERM to their torchruns, and torchrun to its workers, which save
a checkpoint together; then the job is requeued and resumes from there. After a node failure Slurm
requeues it by itself.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.job import ClusterConfig, Job, SlurmConfig
from trainer.process.exit_codes import USER_ERROR

_BATCH = """
# shellcheck disable=SC2016  # the nodes expand what is in single quotes
set -eo pipefail
cd {folder}
{setup}
set -u  # only now: scripts that `module load` runs may use unset variables
{before}
node='
{node} "$@" &
task=$!
# Slurm sends a signal to all processes of a step. Of SIGURG, only this shell takes notice.
trap "interrupted=yes; kill -TERM $task" URG
trap "interrupted=yes" TERM USR1
interrupted=yes
while [[ -n $interrupted ]]; do  # a signal ends the wait
    interrupted=
    code=0
    wait "$task" || code=$?
done
# The other nodes end with the same, unless srun ends them before.
if [[ $code == {user_error} ]]; then sleep {end_seconds}; fi
exit "$code"
'
arguments=({arguments})

job="{job}"
stopping=
asked=
step=
# srun kills its tasks when it gets SIGTERM itself, so the signal goes to the nodes; once, since
# torchrun takes a second one for an order to end at once.
ask_to_stop() {{
    stopping=yes
    interrupted=yes
    if [[ -z $step ]]; then return; fi
    asked=yes
    until squeue --noheader --steps --jobs="$job" --format=%j | grep -x v4 >/dev/null; do
        if ! kill -0 "$step" 2>/dev/null; then return; fi
        sleep 1
    done
    scancel --signal=URG "$job"
}}
trap ask_to_stop TERM

srun --job-name=v4 --kill-on-bad-exit=1{srun} \\
    bash -c "$node" node "${{arguments[@]}}" &
step=$!
if [[ -n $stopping && -z $asked ]]; then ask_to_stop; fi

interrupted=yes
while [[ -n $interrupted ]]; do
    interrupted=
    code=0
    wait "$step" || code=$?
done
if {resumes}; then
    exec scontrol requeue "$job"
fi
exit "$code"
"""

_HEAD = """\
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A node's name need not be one that its network knows; its address is.
V4_HEAD="$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')"
export V4_HEAD

# One torchrun on every node; the first node hosts the rendezvous."""
_ONE_TASK = "--ntasks-per-node=1"
_IS_HOST = "if [[ $SLURM_NODEID == 0 ]]; then is_host=true; else is_host=false; fi"
_END_SECONDS = 10  # in which all nodes learn of a user's error on one of them
_RESUMES = f"-n $stopping && $code != {USER_ERROR}"
"""After bad input or on a full disk, the next start would end with the same."""
_ARRAY_JOB = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
"""A job of an array; SLURM_JOB_ID of one of them is the name of all."""


def script(job: Job) -> str:
    """Returns the text of `train.sbatch`."""
    cluster = job.cluster
    last = job.run.last_checkpoint
    resumes = _RESUMES
    if isinstance(last, Path):  # in object storage, a complete run ends at once
        resumes += f" && ! -d {shlex.quote(str(last))}"
    # From a range, Slurm chooses the number at every start; it is fixed while the job runs.
    nodes = "$SLURM_JOB_NUM_NODES" if job.nodes.is_range else str(job.nodes)
    torchrun = job.torchrun(nodes, f"$V4_HEAD:{cluster.port}", "$SLURM_JOB_ID", "$is_host")
    slurm = _settings(cluster)
    options = [f"--nodes={str(job.nodes).replace(':', '-')}"]
    # A job that sets the number of tasks gets the fewest nodes of a range, so only srun sets it.
    if not job.nodes.is_range:
        options.append(_ONE_TASK)
    if cluster.gpus:
        options.append(f"--gpus-per-node={job.processes_per_node}")
    if slurm.cpus_per_node is not None:
        options.append(f"--cpus-per-task={slurm.cpus_per_node}")
    if slurm.exclusive:
        options.append("--exclusive")
    return _batch(
        cluster,
        name=job.name,
        options=options,
        log=job.out / "%x-%j.log",
        environment=job.environment,
        before=_HEAD,
        node=f"{_IS_HOST}\n" + " \\\n    ".join(torchrun),
        arguments=job.arguments,
        extra_options=[_ONE_TASK] if job.nodes.is_range else [],
        cores=slurm.cpus_per_node,
        job="$SLURM_JOB_ID",
        resumes=f"[[ {resumes} ]]",
    )


def array_script(
    cluster: ClusterConfig,
    name: str,
    command: str,
    arguments: Sequence[str],
    size: int,
    folder: Path,
) -> str:
    """Returns the text of `sweep.sbatch`: an array of jobs that run one command.

    Each has one task, with a GPU where the cluster has them, and shares its node with others.

    Arguments:
        command: options of Python, shell text.
        arguments: of that command.
        folder: for the logs.
    """
    options = [f"--array=0-{size - 1}", "--nodes=1", "--ntasks=1"]
    if cluster.gpus:
        options.append("--gpus-per-node=1")
    return _batch(
        cluster,
        name=name,
        options=options,
        log=folder / "%x-%A-%a.log",
        environment=cluster.environment,
        before=_python_first(cluster),
        node=f"{cluster.python} {command}",
        arguments=arguments,
        extra_options=[],
        cores=None,
        job=_ARRAY_JOB,
        resumes=f"[[ {_RESUMES} ]]",
    )


def _python_first(cluster: ClusterConfig) -> str:
    """Returns the line with which `python` is the cluster's, as wandb's agent starts trials."""
    if "/" not in cluster.python:
        return ""
    folder = cluster.folder.absolute() / cluster.python
    return f'export PATH={shlex.quote(str(folder.parent))}:"$PATH"'


def _settings(cluster: ClusterConfig) -> SlurmConfig:
    assert cluster.slurm is not None
    return cluster.slurm


def _batch(
    cluster: ClusterConfig,
    name: str,
    options: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    before: str,
    node: str,
    arguments: Sequence[str],
    extra_options: Sequence[str],
    cores: int | None,
    job: str,
    resumes: str,
) -> str:
    """Returns a batch script.

    Arguments:
        environment: variables of all tasks.
        before: shell lines of the first node.
        node: shell lines of every task, up to the arguments of its last command.
        extra_options: further options of srun.
        cores: of a task, as `options` has them.
        job: the job's number, shell text.
        resumes: shell condition on which the job is requeued.
    """
    slurm = _settings(cluster)
    head = [
        f"--job-name={name}",
        *options,
        f"--time={slurm.time}",
        f"--signal=B:TERM@{cluster.save_seconds + 60}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(str(log))}",
    ]
    for option in ("partition", "account", "qos"):
        if (value := getattr(slurm, option)) is not None:
            head.append(f"--{option}={value}")
    head += slurm.options
    setup = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    srun = [*extra_options, *_step_options(cluster, slurm, cores)]
    body = _BATCH.format(
        folder=shlex.quote(str(cluster.folder.absolute())),
        setup="\n".join([*setup, *slurm.setup]),
        before=before,
        node=node,
        arguments=shlex.join(arguments),
        srun="".join(f" \\\n    {shlex.quote(word)}" for word in srun),
        job=job,
        resumes=resumes,
        user_error=USER_ERROR,
        end_seconds=_END_SECONDS,
    )
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in head)]) + "\n" + body


def _step_options(cluster: ClusterConfig, slurm: SlurmConfig, cores: int | None) -> list[str]:
    """Returns options of srun, which does not take the cores per task from the job's."""
    options = []
    if cores is not None:
        options.append(f"--cpus-per-task={cores}")
    if slurm.container is not None:
        options.append(f"--container-image={slurm.container}")
        options.append(f"--container-workdir={cluster.folder.absolute()}")
        if slurm.container_mounts:
            options.append(f"--container-mounts={','.join(slurm.container_mounts)}")
    return options
