"""What TorchX would ask of Slurm and Kubernetes, against what these understand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubernetes import client
from torch.distributed import run as torchrun
from torchx import specs

from tests.launch.torchx import ROOT, request

FLAGS = ("--full", "--kinds", "cafe", "--checkpoint_dir", "/shared/run 17")
#: options of Slurm 22.05's manual pages, those that TorchX has use for
#: (https://slurm.schedmd.com/archive/slurm-22.05-latest/sbatch.html, .../srun.html)
SBATCH = {
    *("constraint", "cpus-per-task", "gpus-per-task", "job-name", "mem", "ntasks-per-node"),
    *("partition", "requeue", "time"),
}
SRUN = {"error", "export", "kill-on-bad-exit", "output", "wait"}
#: fields of Volcano's Job (batch.volcano.sh/v1alpha1), from its custom resource definition
VOLCANO_JOB = {
    *("maxRetry", "minAvailable", "minSuccess", "plugins", "policies", "priorityClassName"),
    *("queue", "runningEstimate", "schedulerName", "tasks", "ttlSecondsAfterFinished", "volumes"),
}
VOLCANO_TASK = {
    *("dependsOn", "maxRetry", "minAvailable", "name", "policies", "replicas", "template"),
    "topologyPolicy",
}
VOLCANO_EVENTS = {"PodFailed", "PodEvicted", "JobUnknown", "TaskCompleted", "TaskFailed", "*"}
VOLCANO_ACTIONS = {"AbortJob", "RestartJob", "RestartTask", "TerminateJob", "CompleteJob"}

pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources")


def agent(command: list[str], monkeypatch: pytest.MonkeyPatch, **env: str) -> Any:
    """What torchrun itself reads from a node's command and environment."""
    bash, dash_c, line = command
    assert (bash, dash_c) == ("bash", "-c")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    echoed = subprocess.run(
        ["bash", "-c", line.replace("torchrun", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    return torchrun.parse_args(echoed.stdout.splitlines())


def slurm(*arguments: str) -> tuple[str, list[dict[str, str]], list[list[str]]]:
    """The script, the options of each node's group, and the words of each node's srun."""
    printed = request("slurm", "-cfg", "partition=gpu,time=8:00:00", *arguments)
    script = printed.partition("# SBATCH_SCRIPT\n#----------------\n")[2]
    groups = [
        dict(option.removeprefix("--").partition("=")[::2] for option in shlex.split(line))
        for line in re.findall(r"^#SBATCH (--.*)$", script, re.MULTILINE)
    ]
    assert script.count("#SBATCH hetjob\n") == len(groups) - 1
    (words,) = re.findall(r"^srun (.*?)^exitcode", script, re.MULTILINE | re.DOTALL)
    nodes: list[list[str]] = [[]]
    for word in shlex.split(words.replace("\\\n", " ")):
        nodes.append([]) if word == ":" else nodes[-1].append(word)
    return script, groups, nodes


COMPONENTS = ("cafe.dlrm.train", "cafe.dlrm.evaluate")


@pytest.mark.parametrize("component", COMPONENTS)
def test_slurm_gets_a_group_for_each_node(component: str, monkeypatch: pytest.MonkeyPatch):
    script, groups, nodes = slurm(
        *(component, "-j", "2x8", "--cpu", "96", "--gpu", "8", "--memMB", "1000000"),
        *("--max_retries", "2", "--max_restarts", "3", "--rdzv_port", "29501"),
        *("--env", "NCCL_DEBUG=INFO,OMP_NUM_THREADS=12", "--checkout", str(ROOT), "--", *FLAGS),
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert len(groups) == len(nodes) == 2
    role = component.rpartition(".")[2]
    for number, (group, words) in enumerate(zip(groups, nodes, strict=True)):
        assert group.keys() <= SBATCH
        assert group == {
            **{"job-name": f"{role}-{number}", "requeue": "", "partition": "gpu"},
            **{"time": "8:00:00", "ntasks-per-node": "1", "cpus-per-task": "96"},
            **{"mem": "1000000", "gpus-per-task": "8"},
        }
        options, command = words[:-3], words[-3:]
        given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
        assert given.keys() <= SRUN
        # One task is the torchrun of a node: when it fails, so does the job.
        assert given["kill-on-bad-exit"] == "1"
        env = dict(pair.split("=", 1) for pair in given["export"].split(",")[1:])
        assert given["export"].startswith("ALL,")
        assert (env["NCCL_DEBUG"], env["OMP_NUM_THREADS"]) == ("INFO", "12")
        assert env["PYTHONPATH"] == str(ROOT)
        assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        asked = agent(
            command,
            monkeypatch,
            SLURM_JOB_NODELIST_HET_GROUP_0="node7",
            PET_MAX_RESTARTS=env["PET_MAX_RESTARTS"],
        )
        assert (asked.nnodes, asked.nproc_per_node) == ("2", "8")
        assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", "node7:29501")
        assert asked.rdzv_id == "$SLURM_JOB_ID"
        assert asked.max_restarts == 3
        assert asked.training_script == f"examples.dlrm.{role}"
        assert asked.training_script_args == list(FLAGS)
    assert "export TORCHX_MAX_RETRIES=2" in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_slurm_gets_a_benchmark_as_one_process():
    _, (group,), (words,) = slurm(
        *("cafe.bench.run", "--cpu", "4", "--memMB", "9000", "--", "train_step", "--quick")
    )
    assert (group["cpus-per-task"], group["mem"]) == ("4", "9000")
    assert "gpus-per-task" not in group
    assert words[-4:] == ["python", "-m", "benchmarks.train_step", "--quick"]


def test_named_resources_override_sizes():
    _, (group,), _ = slurm("cafe.dlrm.train", "-j", "1x8", "-h", "aws_p4d.24xlarge")
    host = specs.resource(h="aws_p4d.24xlarge")
    assert (group["cpus-per-task"], group["gpus-per-task"]) == ("96", "8")
    assert group["mem"] == str(host.memMB)


def kubernetes(*arguments: str) -> dict[str, Any]:
    """The job, and that the scheduler knows all its fields."""
    job = yaml.safe_load(request("kubernetes", "-cfg", "queue=ads", *arguments))
    assert job["apiVersion"] == "batch.volcano.sh/v1alpha1"
    assert job["kind"] == "Job"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"].keys() <= VOLCANO_JOB
    assert (job["spec"]["schedulerName"], job["spec"]["queue"]) == ("volcano", "ads")
    api = client.ApiClient()
    for task in job["spec"]["tasks"]:
        assert task.keys() <= VOLCANO_TASK
        for policy in task.get("policies", []):
            assert policy["event"] in VOLCANO_EVENTS
            assert policy["action"] in VOLCANO_ACTIONS
        # Kubernetes' own schema: reading drops fields it does not know, refuses lacking ones.
        response = SimpleNamespace(data=json.dumps(task["template"]))
        read = api.deserialize(response, "V1PodTemplateSpec")
        assert api.sanitize_for_serialization(read) == task["template"]
    return job


@pytest.mark.parametrize("component", COMPONENTS)
def test_kubernetes_gets_a_task_for_each_node(component: str, monkeypatch: pytest.MonkeyPatch):
    job = kubernetes(
        *(component, "-j", "1:2x4", "--image", "registry/cafe:1", "--cpu", "8", "--gpu", "4"),
        *("--memMB", "64000", "--max_retries", "2", "--checkout", "/opt/torchrec-cafe"),
        *("--mounts", "type=volume,src=clicks,dst=/data,readonly,type=bind,src=/nvme,dst=/cache"),
        *("--", *FLAGS),
    )
    role = component.rpartition(".")[2]
    first, second = job["spec"]["tasks"]
    assert job["spec"]["maxRetry"] == 2
    # Elastic: the first node must come, the second may.
    assert (first["minAvailable"], second["minAvailable"]) == (1, 0)
    for number, task in enumerate((first, second)):
        assert (task["name"], task["replicas"], task["maxRetry"]) == (f"{role}-{number}", 1, 2)
        assert {"event": "PodFailed", "action": "RestartJob"} in task["policies"]
        pod = task["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["image"] == "registry/cafe:1"
        assert container["ports"] == [{"name": "c10d", "containerPort": 29500}]
        limits = {"cpu": "8000m", "memory": "64000M", "nvidia.com/gpu": "4"}
        assert container["resources"]["limits"] == limits
        assert container["resources"]["requests"]["nvidia.com/gpu"] == "4"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {
            mount["mountPath"]: (volumes[mount["name"]], mount.get("readOnly", False))
            for mount in container["volumeMounts"]
        }
        volume, is_read_only = mounted["/data"]
        assert (volume["persistentVolumeClaim"], is_read_only) == ({"claimName": "clicks"}, True)
        volume, is_read_only = mounted["/cache"]
        assert (volume["hostPath"], is_read_only) == ({"path": "/nvme"}, False)
        assert "/dev/shm" in mounted
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        assert env["PYTHONPATH"] == "/opt/torchrec-cafe"
        # The first node meets the others at its own door; they find it by the name of its pod.
        monkeypatch.setenv(f"VC_{role.upper()}_0_HOSTS", f"{role}-0-0.job")
        own = {"TORCHX_RANK0_HOST": env["TORCHX_RANK0_HOST"]} if number == 0 else {}
        asked = agent(container["command"], monkeypatch, **own)
        assert asked.nnodes == "1:2"
        assert asked.nproc_per_node == "4"
        host = f"{role}-0-0.job" if number else "localhost"
        assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", f"{host}:29500")
        assert asked.rdzv_id == job["metadata"]["name"]
        assert asked.training_script_args == list(FLAGS)


def test_kubernetes_gets_a_benchmark_as_one_task():
    job = kubernetes("cafe.bench.run", "--image", "registry/cafe:1", "--", "train_step", "--quick")
    (task,) = job["spec"]["tasks"]
    (container,) = task["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "benchmarks.train_step", "--quick"]
    assert job["metadata"]["name"].startswith("bench-train-step-")
