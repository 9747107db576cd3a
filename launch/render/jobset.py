"""Kubernetes: a JobSet (jobset.x-k8s.io/v1alpha2), admitted by Kueue where a queue is named; YAML by a library."""

from __future__ import annotations

import re
from typing import Any

import yaml

from launch.render import shell
from launch.render.job import KINDS, Artefact, JobSpec
from launch.render.sky import Block, Dumper
from training import exits

WORKERS = "workers"
KILLED = 30
"""Seconds of a pod's grace that are left to the kubelet."""


def render(spec: JobSpec) -> Artefact:
    """One pod a host, one Job a slice, and a failure policy in three steps: a pod that was disrupted (preempted,
    drained) restarts the whole set and is not counted; one that ended with a code of `exits.AGAIN` restarts it, at most
    `restarts` times; any other code ends it, since it would only fail again."""
    if not spec.image:
        raise ValueError("jobset needs --image: docker/ has a Dockerfile for each kind of accelerator")
    if spec.processes > 1:
        raise ValueError("jobset runs one process a pod: leave out --processes; it takes all chips of its host")
    if spec.hosts % spec.slices:
        raise ValueError(f"{spec.hosts} hosts are no {spec.slices} equal slices")
    each = spec.hosts // spec.slices
    labels = {"kueue.x-k8s.io/queue-name": spec.queue} if spec.queue else {}
    notes = {}
    if spec.platform == "tpu":
        notes = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    job = {
        "parallelism": each,
        "completions": each,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "NotIn",
                                                  "values": [*exits.AGAIN]}},
        ]},
        "template": {"spec": _pod(spec, each)},
    }  # fmt: skip
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": spec.name} | ({"labels": labels} if labels else {}) | (
            {"annotations": notes} if notes else {}),
        "spec": {
            "failurePolicy": {
                "maxRestarts": spec.restarts,
                "rules": [
                    {"name": "disrupted", "action": "RestartJobSetAndIgnoreMaxRestarts",
                     "onJobFailureReasons": ["PodFailurePolicy"],
                     "onJobFailureMessagePatterns": [".*DisruptionTarget.*"]},
                    {"name": "wrong", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": WORKERS, "replicas": spec.slices, "template": {"spec": job}}],
        },
    }  # fmt: skip
    text = f"{shell.header(spec, 'jobset')}\n" + yaml.dump(manifest, Dumper=Dumper, sort_keys=False, width=1000)
    pods = f"jobset.sigs.k8s.io/jobset-name={spec.name}"
    return Artefact(
        f"{spec.name}.yaml", text, ("kubectl", "create", "-f", "{file}"),
        f"kubectl get jobset {spec.name}; kubectl logs -f -l {pods} --prefix --max-log-requests {spec.hosts}",
        f"kubectl delete jobset {spec.name}  (its pods get SIGTERM, and {spec.grace} s for a checkpoint)",
        f"kubectl delete jobset {spec.name}, if it is still there, and the same command", "kubectl",
    )  # fmt: skip


def _pod(spec: JobSpec, each: int) -> dict[str, Any]:
    annotation = "metadata.annotations['{}']".format
    container: dict[str, Any] = {
        "name": "train",
        "image": spec.image,
        "command": ["bash", "-c", Block(_literal("\n".join([_number(each), *shell.exports(spec), 'exec "$@"', ""])))],
        "args": ["rank", spec.program, *map(_literal, spec.argv)],
        "env": [
            {"name": "JAX_COORDINATOR_ADDRESS",
             "value": f"{spec.name}-{WORKERS}-0-0.{spec.name}:{spec.port}"},
            {"name": "JAX_NUM_PROCESSES", "value": f"{spec.hosts}"},
            {"name": "JOB_INDEX", "valueFrom": {"fieldRef": {
                "fieldPath": annotation("jobset.sigs.k8s.io/job-index")}}},
            *({"name": name, "valueFrom": {"secretKeyRef": _secret(name, place)}} for name, place in spec.secrets),
        ],
        "ports": [{"containerPort": spec.port}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    if spec.workdir:
        container["workingDir"] = spec.workdir
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.grace + KILLED,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if spec.platform != "cpu":
        resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[spec.platform]
        container["resources"] = {"limits": {resource: spec.chips_per_host}}
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet",
                "tolerations": [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]}  # fmt: skip
        pod["nodeSelector"] = _nodes(spec)
    return pod


def _nodes(spec: JobSpec) -> dict[str, str]:
    nodes = {"cloud.google.com/gke-accelerator": KINDS[spec.kind].gke}
    if spec.platform == "tpu":
        nodes = {"cloud.google.com/gke-tpu-accelerator": KINDS[spec.kind].gke,
                 "cloud.google.com/gke-tpu-topology": spec.shape}  # fmt: skip
    return nodes | ({"cloud.google.com/gke-spot": "true"} if spec.spot else {})


def _number(each: int) -> str:
    """A pod knows its place in its Job, and which Job that is."""
    return f"let 'JAX_PROCESS_ID = JOB_INDEX * {each} + JOB_COMPLETION_INDEX'; export JAX_PROCESS_ID"


def _literal(text: str) -> str:
    """As Kubernetes leaves it alone: it puts variables' values for $(NAME), and $ for $$."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _secret(name: str, place: str) -> dict[str, str]:
    """SECRET/KEY; a key of the variable's own name where none is given."""
    secret, _, key = (place or name.lower().replace("_", "-")).partition("/")
    return {"name": secret, "key": key or name}
