"""The PyTorchJob (kubeflow.org/v1) of a job.

The master's pod is the first node, named `JOB-master-0` by the operator's service. A pod that is
evicted gets SIGTERM and time for a last checkpoint. All ranks stop with it, so torchrun exits with
0 everywhere although the run has not reached its last step: such a pod exits with 143, which the
operator treats as an interruption and restarts. So does a pod that has lost the first node. A pod
whose processes failed more often than `max_restarts` ends the job: the operator restarts every pod
that ends with 128 or more, so one whose rank was killed by signal n ends with 1, and its log names
the signal.
"""

import re
import shlex
from typing import Any

import yaml

from launch.job import Job, KubernetesConfig

_SCRIPT = """\
set -euo pipefail
cd {folder}
export TORCHELASTIC_ERROR_FILE="${{TMPDIR:-/tmp}}/torchrun-error.json"
rm -f "$TORCHELASTIC_ERROR_FILE"
job=
ask_to_stop() {{ if [[ -n $job ]]; then kill -TERM "$job" 2>/dev/null || true; fi; }}
trap ask_to_stop TERM
{torchrun} "$@" &
job=$!
# A signal interrupts the first wait; the second one waits for the exit.
stopped=
code=0
wait "$job" || code=$?
if kill -0 "$job" 2>/dev/null; then
    stopped=yes
    wait "$job" || true
fi
if [[ -d {last} ]]; then exit 0; fi
if [[ -n $stopped || $code == 0 ]]; then exit 143; fi
# The node that hosts the rendezvous is gone, which is not this node's failure.
if grep -qs '"message": "Rendezvous' "$TORCHELASTIC_ERROR_FILE"; then exit 143; fi
if (( code >= 128 )); then exit 1; fi
exit "$code"
"""
_TORCHRUN_LINE = " \\\n    "
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
    """Returns the text of `pytorchjob.yaml`."""
    kubernetes = job.cluster.kubernetes
    assert kubernetes is not None
    replicas = {"Master": _replica(job, kubernetes, 1, is_host=True)}
    if job.nodes > 1:
        replicas["Worker"] = _replica(job, kubernetes, job.nodes - 1, is_host=False)
    metadata = {"name": job.name}
    if kubernetes.namespace is not None:
        metadata["namespace"] = kubernetes.namespace
    document = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": kubernetes.backoff_limit},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)


def _replica(job: Job, kubernetes: KubernetesConfig, count: int, is_host: bool) -> dict[str, Any]:
    volumes = [
        {"name": "work", "persistentVolumeClaim": {"claimName": kubernetes.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}},
    ]
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": job.cluster.save_seconds + SHUTDOWN_MARGIN,
        "containers": [_container(job, kubernetes, is_host)],
        "volumes": volumes,
    }
    if kubernetes.node_selector:
        spec["nodeSelector"] = dict(kubernetes.node_selector)
    return {"replicas": count, "restartPolicy": "ExitCode", "template": {"spec": spec}}


def _container(job: Job, kubernetes: KubernetesConfig, is_host: bool) -> dict[str, Any]:
    return {
        "name": "pytorch",  # the container name that the operator expects
        "image": kubernetes.image,
        "command": ["bash", "-c", _literal(_script(job, is_host)), "node"],
        "args": [_literal(argument) for argument in job.arguments],
        "env": _environment(job, kubernetes),
        "ports": [{"name": "pytorchjob-port", "containerPort": job.cluster.port}],
        "resources": _resources(job, kubernetes),
        "volumeMounts": [
            {"name": "work", "mountPath": str(kubernetes.mount)},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _script(job: Job, is_host: bool) -> str:
    endpoint = f"{job.name}-master-0:{job.cluster.port}"
    torchrun = job.torchrun(endpoint, job.name, "true" if is_host else "false")
    return _SCRIPT.format(
        folder=shlex.quote(str(job.cluster.folder)),
        torchrun=_TORCHRUN_LINE.join(torchrun),
        last=shlex.quote(str(job.run.last_checkpoint)),
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
