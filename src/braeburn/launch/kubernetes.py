"""The JobSet that trains on a Kubernetes cluster.

Its text is written out, so that it can carry comments.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from braeburn import extras
from braeburn.errors import UserError
from braeburn.launch.job import Job
from braeburn.launch.places import comment
from braeburn.remote import is_remote

PORT = 8476

_TEMPLATE = """\
# {name} on {target}: {shape}.
# Apply with `kubectl apply -f FILE`, on a cluster with JobSet 0.7 or later
# (https://jobset.sigs.k8s.io).
# Deleted and applied again, it goes on from the last checkpoint in {out}.
{places}apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {jobset}
{annotations}spec:
  # Pods find each other by name: {jobset}-{job}-JOB-POD.{jobset}
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    # When a pod fails, all are started anew, from the last checkpoint.
    maxRestarts: {max_restarts}
    rules:
    # Code 2 is a mistake that the log explains, and no restart would mend.
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: {job}
    # {replicas_comment}
    replicas: {replicas}
    template:
      spec:
        # {pods_comment}
        completionMode: Indexed
        completions: {pods}
        parallelism: {pods}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: braeburn
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            # A pod that is to go saves first.
            terminationGracePeriodSeconds: 120
{placement}            containers:
            - name: braeburn
              # It needs Braeburn with {extra}.
              image: {image}
              command: ["braeburn", "train"]
              args:
{arguments}
{environment}{resources}{mounts}{volumes}"""


def manifest(job: Job, image: str, claim: str | None) -> str:
    """A commented JobSet: one Job for each slice of TPUs and a pod for each of its hosts, or a pod
    for each GPU node.

    Args:
        job: whose run directory is a path within the containers, in a folder where the volume is
            mounted, or a URL if there is one pod.
        image: of the containers.
        claim: name of the PersistentVolumeClaim; None for a run directory at a URL.

    Returns:
        The text of the manifest.

    Raises:
        UserError: the run directory is neither an absolute path below a folder with a claim nor a
            URL without one, there is no such slice of TPUs, or no JAX that could be installed for
            the target, or a value would not stay within its line of the manifest.
    """
    job.check()
    name, out, target = job.name, job.out, job.target
    for option, value in (("--image", image), ("--claim", claim)):
        if value is not None and not re.fullmatch(r"[\w./:@-]+", value, re.ASCII):
            raise UserError(
                f"{option} {value[:80]!a} is no name of Kubernetes; write it as `kubectl` shows it"
            )
    mount = mount_of(job)
    _check_place(job, claim, mount)
    facts, job_name = target.facts, "slice" if target.facts.maker == "google" else "node"
    jobset = ("braeburn-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))[:40].rstrip("-")
    pods, replicas, each = target.nodes_per_slice, target.slices, target.chips_per_node
    extra = (
        f"its extra {facts.extra!r}, which `{extras.target(facts.extra)}` installs"
        if facts.extra
        else "JAX"
    )
    annotations, placement, environment, mounts, volumes = [], [], [], [], []
    if mount:
        environment = [
            "# Compiled programs are kept with the run, so that a restart does not compile again.",
            "- name: JAX_COMPILATION_CACHE_DIR",
            f"  value: {json.dumps(f'{out}/.cache/jax')}",
        ]
        mounts = ["- name: runs", f"  mountPath: {json.dumps(mount)}"]
        volumes = [
            "# Storage that all pods can write to (ReadWriteMany) and that outlives them.",
            "- name: runs",
            "  persistentVolumeClaim:",
            f"    claimName: {json.dumps(claim)}",
        ]
    resources = {"google": "google.com/tpu", "nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}.get(
        facts.maker
    )
    arguments = job.train_arguments
    if facts.maker == "google":
        shape = (
            f"{replicas} slice{'s' * (replicas > 1)} of {target.topology} chips, {pods} hosts each"
        )
        comments = (
            "A Job for each slice.",
            f"A pod for each host of a slice, with its {each} chips.",
        )
        annotations = [
            "annotations:",
            "  # Each slice is one node pool, and takes one Job.",
            "  alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool",
        ]
        placement = [
            "# GKE tells each pod its place in the slice and among the slices, and JAX reads it.",
            "nodeSelector:",
            f"  cloud.google.com/gke-tpu-accelerator: {facts.gke_accelerator}",
            f"  cloud.google.com/gke-tpu-topology: {target.topology}",
        ]
        if replicas > 1:
            placement += [
                "# Traffic between slices is faster without the pod network.",
                "hostNetwork: true",
                "dnsPolicy: ClusterFirstWithHostNet",
            ]
    else:
        # Slices say nothing to nodes: they are all the same.
        pods, replicas, each = pods * replicas, 1, each * facts.devices_per_chip
        kind = "GPU node" if resources else "CPU process"
        shape = f"{pods} {kind}{'s' * (pods > 1)}" + (f" of {each}" if resources else "")
        comments = (
            "One Job for all.",
            f"A pod for each {kind}; its number is that of the process.",
        )
        if pods > 1:
            arguments += [
                "--coordinator",
                f"{jobset}-{job_name}-0-0.{jobset}:{PORT}",
                "--num-processes",
                f"{pods}",
            ]
            # Kubernetes puts the value in.
            arguments += ["--process-id", "$(JOB_COMPLETION_INDEX)"]
        if facts.gke_accelerator:
            placement = [
                "# On GKE; elsewhere, the label that your GPU nodes carry.",
                "nodeSelector:",
                f"  cloud.google.com/gke-accelerator: {facts.gke_accelerator}",
            ]
        if resources:
            mounts += ["- name: shared-memory", "  mountPath: /dev/shm"]
            volumes += ["# The GPUs of a node exchange data through it.", "- name: shared-memory"]
            volumes += ["  emptyDir:", "    medium: Memory"]
        else:
            environment += ["- name: JAX_PLATFORMS", "  value: cpu"]
    limits = ["resources:", "  limits:", f"    {resources}: {each}"] if resources else []
    return _TEMPLATE.format(
        name=name,
        target=target,
        shape=shape,
        out=out,
        jobset=jobset,
        job=job_name,
        annotations=_lines(annotations, 2),
        max_restarts=job.max_restarts,
        replicas_comment=comments[0],
        replicas=replicas,
        pods_comment=comments[1],
        pods=pods,
        placement=_lines(placement, 12),
        extra=extra,
        image=json.dumps(image),
        # JSON's strings are strings of YAML too.
        arguments=_lines([f"- {json.dumps(argument)}" for argument in arguments], 14).rstrip("\n"),
        places=comment(job.places),
        environment=_lines(["env:", *environment] if environment else [], 14),
        resources=_lines(limits, 14),
        mounts=_lines(["volumeMounts:", *mounts] if mounts else [], 14),
        volumes=_lines(["volumes:", *volumes] if volumes else [], 12),
    )


def mount_of(job: Job) -> str | None:
    """The folder of the containers where the volume is mounted; None for a run at a URL."""
    return None if is_remote(job.out) else str(Path(job.out).parent)


def _check_place(job: Job, claim: str | None, mount: str | None) -> None:
    """Refuses a run directory that pods could not share."""
    out, target = job.out, job.target
    if mount is None:
        each = 1 if target.facts.maker == "cpu" else target.chips_per_node
        pods = target.chips // each
        if claim is not None:
            raise UserError(
                f"--claim {claim} is for a run directory in a volume, and --out {out!r} is a URL; "
                f"leave --claim out, or name a path in the volume with --out, as /runs/{job.name}"
            )
        if pods > 1:
            raise UserError(
                f"--out {out!r} cannot be written by {pods} pods, which write the parts of a "
                f"checkpoint into one folder; name a path in a volume with --out and --claim, as "
                f"/runs/{job.name}"
            )
        return
    if not Path(out).is_absolute() or len(Path(out).parts) < 3:
        raise UserError(
            f"--out {out!r} must lie in the folder of the volume; give a path as /runs/{job.name}"
        )
    if claim is None:
        raise UserError(
            f"--claim is missing; name the PersistentVolumeClaim for the folder {mount!r} of --out"
        )


def _lines(lines: Sequence[str], indent: int) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in lines)
