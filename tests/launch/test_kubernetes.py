"""Jobs for Kubernetes: the published schemas accept them, and what their pods run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import (
    IoK8sApiCoreV1PodTemplateSpec as PodTemplate,
)
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import (
    TrainerV1alpha1TrainJob as TrainJob,
)
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import (
    TrainerV1alpha1TrainingRuntime as TrainingRuntime,
)

from launch import is_complete
from launch.cluster import load_cluster, write_job
from launch.job import Nodes
from tests.distributed import free_port
from tests.launch.jobs import DEBUG, HARD, check_script, torchrun_options, write
from tests.trainer.tiny import steps_in_file
from trainer.config import load_config

ROOT = Path(__file__).parents[2]
KUBERNETES = """
kind: kubernetes
folder: /work
environment: {NCCL_SOCKET_IFNAME: eth0}
kubernetes: {image: registry/x:1, claim: work, mount: /work, memory: '1e3', cpu: "8"}
"""
TRAIN_JOB = KUBERNETES.replace("{image", "{job: TrainJob, image")
LOCAL = "kind: kubernetes\nkubernetes: {image: x, claim: work, mount: /work}\n"

# kubeflow.org/v1 of Kubeflow's training operator 1.9: the fields of each part, and their values.
PYTORCH_JOB_SPEC = {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
RUN_POLICY: dict[str, Any] = {
    "activeDeadlineSeconds": int, "backoffLimit": int, "cleanPodPolicy": ("All", "Running", "None"),
    "managedBy": str, "schedulingPolicy": dict, "suspend": bool, "ttlSecondsAfterFinished": int,
}  # fmt: skip
REPLICA: dict[str, Any] = {
    "replicas": int, "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"), "template": dict
}  # fmt: skip


def accepts(model: Any, document: dict[str, Any]) -> None:
    """The published model takes a document, and has a place for all of it."""
    assert json.loads(model.from_dict(document).to_json()) == document


def conforms(part: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in part.items():
        kind = fields[name]
        assert value in kind if isinstance(kind, tuple) else type(value) is kind, name


def test_the_pytorchjob(tmp_path: Path) -> None:
    path = write(tmp_path, KUBERNETES, 3, 2, *HARD)
    assert path == tmp_path / "pytorchjob.yaml"
    job = yaml.safe_load(path.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"] == {"name": "v4-debug"}
    assert job["spec"].keys() <= PYTORCH_JOB_SPEC
    conforms(job["spec"]["runPolicy"], RUN_POLICY)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {kind: part["replicas"] for kind, part in replicas.items()} == {"Master": 1, "Worker": 2}
    for kind, part in replicas.items():
        conforms(part, REPLICA)
        accepts(PodTemplate, part["template"])
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        check_container(container, "v4-debug-master-0:29500")
        assert f"\nis_host={str(kind == 'Master').lower()}\n" in container["command"][2]
        assert pod["terminationGracePeriodSeconds"] > 300
    assert 'memory: "1e3"' in path.read_text()  # a number to readers of YAML 1.2


def check_container(container: dict[str, Any], endpoint: str) -> None:
    assert container["image"] == "registry/x:1"
    script = container["command"][2].replace("$$(", "$(")
    options = torchrun_options(script)
    assert options["--rdzv-endpoint"] == endpoint
    assert "is_host=$is_host" in options["--rdzv-conf"]
    arguments = [arg.replace("$$(", "$(") for arg in container["args"]]
    assert arguments == [str(DEBUG), *HARD, "device=cuda"]
    assert "'$$(HOME)'" in container["args"][1]  # not the pod's variable
    amounts = container["resources"]["limits"]
    assert amounts == {"nvidia.com/gpu": 2, "cpu": "8", "memory": "1e3"}
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["NCCL_SOCKET_IFNAME"] == "eth0" and "WANDB_API_KEY" not in variables
    check_script(script)


def test_the_trainjob_and_its_runtime(tmp_path: Path) -> None:
    path = write(tmp_path, TRAIN_JOB, 3, 2, *HARD)
    assert path == tmp_path / "trainjob.yaml"
    runtime, job = yaml.safe_load_all(path.read_text())
    accepts(TrainingRuntime, runtime)
    accepts(TrainJob, job)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "v4-debug"
    assert job["spec"]["trainer"]["numNodes"] == 3
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]
    assert pods["template"]["spec"]["restartPolicy"] == "Never"  # as a podFailurePolicy demands
    rules = {rule["action"]: rule for rule in pods["podFailurePolicy"]["rules"][1:]}
    assert rules["Ignore"]["onExitCodes"]["values"] == [143]
    assert rules["FailJob"]["onExitCodes"]["values"] == [1, 2]
    (container,) = pods["template"]["spec"]["containers"]
    check_container(container, "v4-debug-node-0-0.v4-debug:29500")


def test_a_job_of_as_many_nodes_as_there_are(tmp_path: Path) -> None:
    """There are pods for all; torchrun, and a scheduler that waits for a group, need the fewest."""
    job = yaml.safe_load(write(tmp_path, KUBERNETES, "2:4").read_text())
    conforms(job["spec"]["runPolicy"], RUN_POLICY)
    assert job["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 2}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert [replicas[kind]["replicas"] for kind in ("Master", "Worker")] == [1, 3]
    templates = [replica["template"] for replica in replicas.values()]
    runtime, train = yaml.safe_load_all(write(tmp_path, TRAIN_JOB, "2:4").read_text())
    accepts(TrainingRuntime, runtime)
    accepts(TrainJob, train)
    assert train["spec"]["trainer"]["numNodes"] == 4
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]
    assert pods["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    for template in (*templates, pods["template"]):
        script = template["spec"]["containers"][0]["command"][2].replace("$$(", "$(")
        check_script(script)
        assert torchrun_options(script)["--nnodes"] == "2:4"


def test_a_schema_refuses_a_field_that_it_does_not_have(tmp_path: Path) -> None:
    runtime, job = yaml.safe_load_all(write(tmp_path, TRAIN_JOB).read_text())
    job["spec"]["trainer"]["nodes"] = 3
    with pytest.raises(AssertionError):
        accepts(TrainJob, job)
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    replicated["template"]["spec"]["backoffLimit"] = "20"
    with pytest.raises(ValueError, match="backoffLimit"):
        accepts(TrainingRuntime, runtime)


@pytest.mark.parametrize(("index", "is_host"), [("0", "true"), ("2", "false")])
def test_the_first_pod_of_a_trainjob_hosts_the_rendezvous(
    tmp_path: Path, index: str, is_host: str
) -> None:
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/words\n')
    stub.chmod(0o755)
    text = f"python: {stub}\n" + TRAIN_JOB.replace("folder: /work", f"folder: {tmp_path}")
    _, container = pods_of(write(tmp_path, text))
    environment = {**os.environ, "TMPDIR": str(tmp_path), "JOB_COMPLETION_INDEX": index}
    subprocess.run(command_of(container), env=environment, check=False)
    assert f"--rdzv-conf is_host={is_host},join" in (tmp_path / "words").read_text()


def pods_of(manifest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The template of the first node's pod, and its container."""
    first = next(iter(yaml.safe_load_all(manifest.read_text())))
    if first["kind"] == "PyTorchJob":
        template = first["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    else:
        (replicated,) = first["spec"]["template"]["spec"]["replicatedJobs"]
        template = replicated["template"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    return template, container


def command_of(container: dict[str, Any]) -> list[str]:
    """What Kubernetes runs, on a host whose name is that of the first node."""
    words = [*container["command"], *container["args"]]
    words = [word.replace("$$(", "$(") for word in words]
    return [word.replace("v4-run-master-0", "localhost") for word in words]


def test_one_node_has_no_workers_and_secrets_are_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    secret = KUBERNETES.replace("cpu:", "wandb_secret: {name: wandb, key: api-key}, cpu:")
    text = write(tmp_path, secret, 1).read_text()
    replicas = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    (entry,) = (entry for entry in container["env"] if entry["name"] == "WANDB_API_KEY")
    reference = {"name": "wandb", "key": "api-key", "optional": True}
    assert entry == {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": reference}}
    assert "very-secret" not in text


def local_job(tiny: Path, tmp_path: Path, text: str, steps: int) -> list[str]:
    """The command of the one pod of a job on this machine's CPU."""
    text += f"folder: {ROOT}\npython: {sys.executable}\nport: {free_port()}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = load_cluster(str(tmp_path / "cluster.yaml"))
    arguments = [str(tiny), f"steps={steps}", f"run_dir={tmp_path / 'run'}"]
    run = load_config(tiny, arguments[1:])
    _, container = pods_of(write_job(run, arguments, cluster, Nodes(1, 1), 0, tmp_path))
    return command_of(container)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").is_file() or steps_in_file(run_dir)[-1:] < [step]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_pod_that_is_taken_away_saves_and_counts_as_interrupted(
    tiny: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = local_job(tiny, tmp_path, LOCAL, 100_000)
    with subprocess.Popen(command, env=environment) as process:
        wait_for_step(tmp_path / "run", 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    last = steps_in_file(tmp_path / "run")[-1]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}").is_dir()
    command = local_job(tiny, tmp_path, LOCAL, last + 2)
    assert subprocess.run(command, env=environment).returncode == 0
    mistake = [word.replace(f"run_dir={tmp_path}/run", "data.shards=nowhere") for word in command]
    (tmp_path / f"run/checkpoints/step-{last + 2:08d}").rename(tmp_path / "elsewhere")
    assert subprocess.run(mistake, env=environment).returncode == 2


def test_a_run_folder_is_complete_or_not(tiny: Path, tmp_path: Path) -> None:
    """As in `v4 plan RUN_FOLDER --cluster kubernetes`, whose pods get the folder."""
    run = load_config(tiny, [f"run_dir={tmp_path}/run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(tiny.read_text())
    assert is_complete.main([str(tmp_path / "run")]) == 1
    assert isinstance(run.last_checkpoint, Path)
    run.last_checkpoint.mkdir(parents=True)
    assert is_complete.main([str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_ends_the_job(tiny: Path, tmp_path: Path) -> None:
    """The pod ends with 1, since the operator restarts all that end with 128 or more."""
    command = local_job(tiny, tmp_path, LOCAL + "max_restarts: 0\n", 100_000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path / "run", 1, process)
        (worker,) = psutil.Process(process.pid).children(recursive=True)[-1:]
        words = worker.cmdline()
        assert words[words.index(str(tiny)) - 1] == "trainer"
        worker.kill()
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "was killed by SIGKILL (signal 9)" in process.stderr.read()


@pytest.mark.parametrize(
    ("error", "code"), [("RendezvousConnectionError: gone", 143), ("RuntimeError: ours", 1)]
)
def test_a_pod_that_has_lost_the_first_node_starts_again(
    tmp_path: Path, error: str, code: int
) -> None:
    torchrun = tmp_path / "python"
    page = json.dumps({"message": {"message": error}})
    torchrun.write_text(f"#!/bin/bash\necho '{page}' > $TORCHELASTIC_ERROR_FILE; exit 1\n")
    torchrun.chmod(0o755)
    text = f"python: {torchrun}\n" + KUBERNETES.replace("folder: /work", f"folder: {tmp_path}")
    _, container = pods_of(write(tmp_path, text))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run(command_of(container), env=environment, check=False).returncode == code
