"""The sbatch script of a job.

Slurm sends SIGTERM to the batch shell some time before the limit. The shell passes it to srun, srun
to all torchruns, and these to their workers, which save a checkpoint together; then the job is
requeued and resumes from there. After a node failure Slurm requeues it by itself.
"""

import shlex

from launch.job import Job, SlurmConfig

_BODY = """
set -eo pipefail
cd {folder}
{setup}
set -u  # only now: scripts that `module load` runs may use unset variables
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export V4_HEAD="${{hosts[0]}}"

# One torchrun on every node; the first node hosts the rendezvous.
# shellcheck disable=SC2016
node='
if [[ $SLURM_NODEID == 0 ]]; then is_host=true; else is_host=false; fi
exec {torchrun} "$@"
'
arguments=({arguments})

stopping=
step=
ask_to_stop() {{
    stopping=yes
    if [[ -n $step ]]; then kill -TERM "$step" 2>/dev/null || true; fi
}}
trap ask_to_stop TERM

srun --kill-on-bad-exit=1{srun} \\
    bash -c "$node" node "${{arguments[@]}}" &
step=$!

# A signal interrupts the first wait; the second one waits for the exit.
code=0
wait "$step" || code=$?
if [[ -n $stopping ]]; then
    code=0
    wait "$step" || code=$?
fi
if [[ -n $stopping && ! -d {last} ]]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def script(job: Job) -> str:
    """Returns the text of `train.sbatch`."""
    slurm = job.cluster.slurm
    assert slurm is not None
    torchrun = job.torchrun(f"$V4_HEAD:{job.cluster.port}", "$SLURM_JOB_ID", "$is_host")
    setup = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    body = _BODY.format(
        folder=shlex.quote(str(job.cluster.folder.absolute())),
        setup="\n".join([*setup, *slurm.setup]),
        torchrun=" \\\n    ".join(torchrun),
        arguments=shlex.join(job.arguments),
        srun=_container(job, slurm),
        last=shlex.quote(str(job.run.last_checkpoint)),
    )
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job, slurm))]
    return "\n".join(head) + "\n" + body


def _options(job: Job, slurm: SlurmConfig) -> list[str]:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--time={slurm.time}",
        f"--signal=B:TERM@{job.cluster.save_seconds + 60}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(str(job.out / '%x-%j.log'))}",
    ]
    if job.cluster.gpus:
        options.append(f"--gpus-per-node={job.processes_per_node}")
    for name in ("partition", "account", "qos"):
        if (value := getattr(slurm, name)) is not None:
            options.append(f"--{name}={value}")
    if slurm.cpus_per_node is not None:
        options.append(f"--cpus-per-task={slurm.cpus_per_node}")
    if slurm.exclusive:
        options.append("--exclusive")
    return [*options, *slurm.options]


def _container(job: Job, slurm: SlurmConfig) -> str:
    if slurm.container is None:
        return ""
    options = [f"--container-image={slurm.container}"]
    options.append(f"--container-workdir={job.cluster.folder.absolute()}")
    if slurm.container_mounts:
        options.append(f"--container-mounts={','.join(slurm.container_mounts)}")
    return "".join(f" \\\n    {shlex.quote(word)}" for word in options)
