"""The JobSet that trains on a Kubernetes cluster, or does a job after training.

Its text is written out, so that it can carry comments.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braeburn import extras
from braeburn.errors import UserError
from braeburn.hardware.targets import Target
from braeburn.launch.job import Job, check_line
from braeburn.launch.places import CACHE, comment

PORT = 8476
# A label and an annotation of each pod of an indexed Job: its number.
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"

_TEMPLATE = """\
# {name} on {target}: {shape}.
# Apply with `kubectl apply -f FILE`, on a cluster with JobSet 0.7 or later
# (https://jobset.sigs.k8s.io).
# Deleted and applied again, it {begins}.
# The log of process 0, where what it prints as the result stands too:
#   kubectl logs --tail=-1 --selector={process_0}
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
    # When a pod fails, all are started anew, {origin}.
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
{saving}{placement}            containers:
            - name: braeburn
              # It needs Braeburn with {extra}.
              image: {image}
              command: ["braeburn", {command}]
              args:
{arguments}
{environment}{resources}{mounts}{volumes}"""


@dataclass(frozen=True)
class Volume:
    """The storage that pods share.

    Attributes:
        claim: name of the PersistentVolumeClaim; None for a job without a volume.
        mount: the folder of the containers where it is mounted; None for the parent folder of the
            run directory.
    """

    claim: str | None = None
    mount: str | None = None

    def folder(self, job: Job) -> str | None:
        """The folder of the containers where the volume of a job is mounted; None without one."""
        if self.mount is not None:
            return self.mount
        return None if job.home.is_remote else str(Path(job.home.path).parent)


def processes_of(target: Target) -> int:
    """How many pods a job has: one for each host of TPUs, each node of GPUs or each CPU process."""
    return target.slices * target.nodes_per_slice


def manifest(job: Job, image: str, volume: Volume) -> str:
    """A commented JobSet: one Job for each slice of TPUs and a pod for each of its hosts, or a pod
    for each GPU node.

    Args:
        job: whose paths are those within the containers.
        image: of the containers.
        volume: that holds what all pods must reach and is no URL.

    Returns:
        The text of the manifest.

    Raises:
        UserError: the run directory or what is made lies neither in the volume nor at a URL that
            the pods can write to, there is no such slice of TPUs, or no JAX that could be installed
            for the target, or a value would not stay within its line of the manifest.
    """
    name, target = job.name, job.target
    job.check()
    for option, value in (("--image", image), ("--claim", volume.claim)):
        if value is not None and not re.fullmatch(r"[\w./:@-]+", value, re.ASCII):
            raise UserError(
                f"{option} {value[:80]!a} is no name of Kubernetes; write it as `kubectl` shows it"
            )
    _check_places(job, volume)
    mount = volume.folder(job)
    facts, job_name = target.facts, "slice" if target.facts.maker == "google" else "node"
    jobset = ("braeburn-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))[:40].rstrip("-")
    pods, replicas, each = target.nodes_per_slice, target.slices, target.chips_per_node
    extra = (
        f"its extra {facts.extra!r}, which `{extras.target(facts.extra)}` installs"
        if facts.extra
        else "JAX"
    )
    annotations, placement, environment, mounts, volumes = [], [], [], [], []
    if mount and job.keeps_programs and Path(job.home.path).is_relative_to(mount):
        environment = [
            "# Compiled programs are kept with the run, so that a restart does not compile again.",
            "- name: JAX_COMPILATION_CACHE_DIR",
            f"  value: {_literal(f'{job.home.path}/.cache/jax')}",
        ]
    if mount:
        mounts = ["- name: runs", f"  mountPath: {_string(mount)}"]
        volumes = [
            "# Storage that all pods can write to (ReadWriteMany) and that outlives them.",
            "- name: runs",
            "  persistentVolumeClaim:",
            f"    claimName: {_string(volume.claim or '')}",
        ]
    resources = {"google": "google.com/tpu", "nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}.get(
        facts.maker
    )
    if facts.maker == "google":
        shape = (
            f"{replicas} slice{'s' * (replicas > 1)} of {target.topology} chips, {pods} "
            f"host{'s' * (pods > 1)} each"
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
        kind, plural = ("GPU node", "s") if resources else ("CPU process", "es")
        shape = f"{pods} {kind}{plural * (pods > 1)}" + (f" of {each}" if resources else "")
        comments = (
            "One Job for all.",
            f"A pod for each {kind}; its number is that of the process.",
        )
        if pods > 1:
            environment += _meeting(f"{jobset}-{job_name}-0-0.{jobset}:{PORT}", pods)
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
    first = [f"jobset-name={jobset}", "job-index=0"]
    labels = [*(f"jobset.sigs.k8s.io/{label}" for label in first), f"{COMPLETION_INDEX}=0"]
    saving = ["# A pod that is to go saves first.", "terminationGracePeriodSeconds: 120"]
    return _TEMPLATE.format(
        name=name,
        target=target,
        shape=shape,
        begins=job.begins,
        origin=job.origin,
        process_0=",".join(labels),
        saving=_lines(saving if job.trains else [], 12),
        command=_string(job.command),
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
        image=_string(image),
        arguments=_lines([f"- {_literal(text)}" for text in job.arguments], 14).rstrip("\n"),
        places=comment(job.places),
        environment=_lines(["env:", *environment] if environment else [], 14),
        resources=_lines(limits, 14),
        mounts=_lines(["volumeMounts:", *mounts] if mounts else [], 14),
        volumes=_lines(["volumes:", *volumes] if volumes else [], 12),
    )


def _meeting(coordinator: str, pods: int) -> list[str]:
    """Variables that tell each pod of the others, as any command of Braeburn reads them."""
    return [
        "# Where process 0 listens, and which process this one is.",
        "- name: JAX_COORDINATOR_ADDRESS",
        f"  value: {coordinator}",
        "- name: JAX_NUM_PROCESSES",
        f'  value: "{pods}"',
        "- name: JAX_PROCESS_ID",
        "  valueFrom:",
        "    fieldRef:",
        f"      fieldPath: metadata.annotations['{COMPLETION_INDEX}']",
    ]


def _check_places(job: Job, volume: Volume) -> None:
    """Refuses a run directory that pods could not share, and results that would be lost."""
    home, pods, mount = job.home, processes_of(job.target), volume.folder(job)
    example = f"/runs/{Path(home.path).name or job.name}"
    if volume.mount is not None:
        check_line("--mount", volume.mount)
        if not Path(volume.mount).is_absolute() or volume.mount.strip("/") == "":
            raise UserError(
                f"--mount {volume.mount!r} is no folder of the containers that a volume can take "
                f"the place of; give a path as /runs"
            )
    if mount is None and volume.claim is not None:
        raise UserError(
            f"--claim {volume.claim} is for a run directory in a volume, and {home.label} is a "
            f"URL; leave --claim out, or say with --mount where the volume is to be, as "
            f"--mount /runs"
        )
    if job.trains and home.is_remote and pods > 1:
        raise UserError(
            f"{home.label} cannot be written by {pods} pods, which write the parts of a "
            f"checkpoint into one folder; name a path in a volume with --out and --claim, as "
            f"{example}"
        )
    path = Path(home.path)
    if not home.is_remote and not (path.is_absolute() and (volume.mount or len(path.parts) > 2)):
        raise UserError(
            f"{home.label} must lie in the folder of the volume; give a path as {example}"
        )
    if mount is not None and volume.claim is None:
        raise UserError(
            f"--claim is missing; name the PersistentVolumeClaim for the folder {mount!r}"
            + ("" if volume.mount else f" of {home.field}")
        )
    for place in (home, *job.places):
        if place.read or place.is_remote or place.field == CACHE:
            continue
        if mount is None or not Path(place.path).is_relative_to(mount):
            fix = (
                f"name a path below {mount!r}, or another folder for the volume with --mount"
                if mount
                else "add a volume that holds it, with --claim and --mount"
            )
            raise UserError(f"{place.label} is in no volume and would be lost with the pod; {fix}")


def _string(text: str) -> str:
    """A string of YAML: one of JSON, but for characters beyond 16 bits, which JSON writes as two
    that YAML refuses.
    """
    return re.sub(
        r"[^ -~]",
        lambda found: found[0] if found[0].isprintable() else f"\\U{ord(found[0]):08x}",
        json.dumps(text, ensure_ascii=False),
    )


def _literal(text: str) -> str:
    """A string of YAML for where Kubernetes would put variables in the place of `$(NAME)`, and one
    `$` in that of two.
    """
    return _string(text.replace("$", "$$"))


def _lines(lines: Sequence[str], indent: int) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in lines)
