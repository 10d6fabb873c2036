"""The PyTorchJob (kubeflow.org/v1) or the TrainJob (trainer.kubeflow.org/v1alpha1) of a job.

The first node is the pod that hosts the rendezvous: `JOB-master-0` by the training operator's
service, `JOB-node-0-0.JOB` by that of a TrainJob's JobSet. A pod that is evicted gets SIGTERM and
time for a last checkpoint. All ranks stop with it, so torchrun exits with 0 everywhere although the
run has not reached its last step: such a pod exits with 143, which counts as an interruption, and
is started again. So does a pod that has lost the first node. A pod whose processes failed more
often than `max_restarts` ends the job: the training operator restarts every pod that ends with 128
or more, so one whose rank was killed by signal n ends with 1, and its log names the signal.

A job of MIN to MAX nodes has MAX pods, of which torchrun needs MIN: pods without a node stay
pending, and join the others later. It is complete with its first pod, also where others still wait.
"""

import re
import shlex
from typing import Any

import yaml

from launch.job import Job, KubernetesConfig
from trainer.process.exit_codes import FAILED, USER_ERROR, exit_code_of

_SCRIPT = """\
set -euo pipefail
cd {folder}
export TORCHELASTIC_ERROR_FILE="${{TMPDIR:-/tmp}}/torchrun-error.json"
rm -f "$TORCHELASTIC_ERROR_FILE"
is_host={is_host}
job=
stopped=
asked=
ask_to_stop() {{
    stopped=yes
    interrupted=yes
    if [[ -z $job ]]; then return; fi
    asked=yes
    kill -TERM "$job" 2>/dev/null || true
}}
trap ask_to_stop TERM
{torchrun} "$@" &
job=$!
if [[ -n $stopped && -z $asked ]]; then ask_to_stop; fi
interrupted=yes
while [[ -n $interrupted ]]; do  # a signal ends the wait
    interrupted=
    code=0
    wait "$job" || code=$?
done
if [[ $code == {user_error} ]]; then exit "$code"; fi
if {python} -m launch.is_complete "$@"; then exit 0; fi
if [[ -n $stopped || $code == 0 ]]; then exit 143; fi
# The node that hosts the rendezvous is gone, which is not this node's failure.
if grep -qs '"message": "Rendezvous' "$TORCHELASTIC_ERROR_FILE"; then exit 143; fi
if (( code >= 128 )); then exit 1; fi
exit "$code"
"""
_TORCHRUN_LINE = " \\\n    "
_IS_FIRST_POD = "$([[ $JOB_COMPLETION_INDEX == 0 ]] && echo true || echo false)"
"""Shell text; the index is what Kubernetes gives a pod of an indexed Job."""
_INTERRUPTED = exit_code_of(-15)
SHUTDOWN_MARGIN = 60  # seconds between the deadline of the last checkpoint and SIGKILL


class _Dumper(yaml.SafeDumper):
    """Quotes every string that a YAML reader might parse as a number or a boolean."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    if style is None and not re.fullmatch(r"[A-Za-z][A-Za-z0-9/._-]{2,}", text):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def manifest(job: Job) -> str:
    """Returns the text of `pytorchjob.yaml` or `trainjob.yaml`, whichever the cluster file asks."""
    kubernetes = job.cluster.kubernetes
    assert kubernetes is not None
    if kubernetes.job == "TrainJob":
        documents = [_training_runtime(job, kubernetes), _train_job(job, kubernetes)]
    else:
        documents = [_pytorch_job(job, kubernetes)]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def _metadata(job: Job, kubernetes: KubernetesConfig) -> dict[str, str]:
    metadata = {"name": job.name}
    if kubernetes.namespace is not None:
        metadata["namespace"] = kubernetes.namespace
    return metadata


def _pytorch_job(job: Job, kubernetes: KubernetesConfig) -> dict[str, Any]:
    replicas = {"Master": _replica(job, kubernetes, 1, is_host=True)}
    if job.nodes.high > 1:
        replicas["Worker"] = _replica(job, kubernetes, job.nodes.high - 1, is_host=False)
    policy: dict[str, Any] = {
        "cleanPodPolicy": "Running",
        "backoffLimit": kubernetes.backoff_limit,
    }
    if job.nodes.is_range:  # for a scheduler that would wait until there is room for all pods
        policy["schedulingPolicy"] = {"minAvailable": job.nodes.low}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job, kubernetes),
        "spec": {
            "runPolicy": policy,
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replica(job: Job, kubernetes: KubernetesConfig, count: int, is_host: bool) -> dict[str, Any]:
    script = _script(job, f"{job.name}-master-0", "true" if is_host else "false")
    container = {
        "name": "pytorch",  # the container name that the operator expects
        **_container(job, kubernetes, script),
        "ports": [{"name": "pytorchjob-port", **_port(job)}],
    }
    template = {"spec": _pod(job, kubernetes, container)}
    return {"replicas": count, "restartPolicy": "ExitCode", "template": template}


def _port(job: Job) -> dict[str, Any]:
    return {"containerPort": job.cluster.port, "protocol": "TCP"}


def _train_job(job: Job, kubernetes: KubernetesConfig) -> dict[str, Any]:
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job, kubernetes),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": job.name,
            },
            "trainer": {"numNodes": job.nodes.high},
        },
    }


def _training_runtime(job: Job, kubernetes: KubernetesConfig) -> dict[str, Any]:
    """Returns the job's own runtime: volumes and rules for failures are no part of a TrainJob."""
    script = _script(job, f"{job.name}-node-0-0.{job.name}", _IS_FIRST_POD)
    container = {
        "name": "node",  # of the container and of the replicated job, for the controller
        **_container(job, kubernetes, script),
        "ports": [_port(job)],
    }
    pods: dict[str, Any] = {
        "backoffLimit": kubernetes.backoff_limit,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "Ignore", "onExitCodes": _exits("In", _INTERRUPTED)},
                {"action": "FailJob", "onExitCodes": _exits("In", FAILED, USER_ERROR)},
            ]
        },
        "template": {"spec": {"restartPolicy": "Never", **_pod(job, kubernetes, container)}},
    }
    if job.nodes.is_range:
        pods["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    replicated = {"name": "node", "template": {"metadata": {"labels": step}, "spec": pods}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(job, kubernetes),
        "spec": {
            "mlPolicy": {"numNodes": job.nodes.high},
            "template": {"spec": {"replicatedJobs": [replicated]}},
        },
    }


def _exits(operator: str, *codes: int) -> dict[str, Any]:
    return {"containerName": "node", "operator": operator, "values": list(codes)}


def _pod(job: Job, kubernetes: KubernetesConfig, container: dict[str, Any]) -> dict[str, Any]:
    volumes = [
        {"name": "work", "persistentVolumeClaim": {"claimName": kubernetes.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}},
    ]
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": job.cluster.save_seconds + SHUTDOWN_MARGIN,
        "containers": [container],
        "volumes": volumes,
    }
    if kubernetes.node_selector:
        spec["nodeSelector"] = dict(kubernetes.node_selector)
    return spec


def _container(job: Job, kubernetes: KubernetesConfig, script: str) -> dict[str, Any]:
    return {
        "image": kubernetes.image,
        "command": ["bash", "-c", _literal(script), "node"],
        "args": [_literal(argument) for argument in job.arguments],
        "env": _environment(job, kubernetes),
        "resources": _resources(job, kubernetes),
        "volumeMounts": [
            {"name": "work", "mountPath": str(kubernetes.mount)},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _script(job: Job, head: str, is_host: str) -> str:
    """Returns what a pod runs.

    Arguments:
        head: name of the first node.
        is_host: whether the pod is the first node, shell text.
    """
    torchrun = job.torchrun(str(job.nodes), f"{head}:{job.cluster.port}", job.name, "$is_host")
    return _SCRIPT.format(
        folder=shlex.quote(str(job.cluster.folder)),
        is_host=is_host,
        torchrun=_TORCHRUN_LINE.join(torchrun),
        python=job.cluster.python,
        user_error=USER_ERROR,
    )


def _literal(text: str) -> str:
    """Escapes `$(NAME)`, which Kubernetes would expand, as `$$(NAME)`."""
    return text.replace("$(", "$$(")


def _environment(job: Job, kubernetes: KubernetesConfig) -> list[dict[str, Any]]:
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.environment.items()
    ]
    if (secret := kubernetes.wandb_secret) is not None:
        reference = {"name": secret.name, "key": secret.key, "optional": True}
        variables.append({"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": reference}})
    return variables


def _resources(job: Job, kubernetes: KubernetesConfig) -> dict[str, Any]:
    amounts: dict[str, Any] = {}
    if job.cluster.gpus:
        amounts[kubernetes.gpu_resource] = job.processes_per_node
    for name in ("cpu", "memory"):
        if (value := getattr(kubernetes, name)) is not None:
            amounts[name] = value
    return {"requests": amounts, "limits": amounts}
