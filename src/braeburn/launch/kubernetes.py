"""The JobSet that trains on a Kubernetes cluster.

Its text is written out, so that it can carry comments.
"""

import json
import re
from collections.abc import Sequence

from braeburn import extras
from braeburn.errors import UserError
from braeburn.launch.job import Job

PORT = 8476

_TEMPLATE = """\
# {name} on {target}: {shape}.
# Apply with `kubectl apply -f FILE`, on a cluster with JobSet 0.7 or later
# (https://jobset.sigs.k8s.io).
# Deleted and applied again, it goes on from the last checkpoint in {out}.
apiVersion: jobset.x-k8s.io/v1alpha2
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
              env:
              # Compiled programs are kept with the run, so that a restart does not compile again.
              - name: JAX_COMPILATION_CACHE_DIR
                value: {cache}
{environment}{resources}              volumeMounts:
              - name: runs
                mountPath: {mount}
{mounts}            volumes:
            # Storage that all pods can write to (ReadWriteMany) and that outlives them.
            - name: runs
              persistentVolumeClaim:
                claimName: {claim}
{volumes}"""


def manifest(job: Job, image: str, claim: str) -> str:
    """A commented JobSet: one Job for each slice of TPUs and a pod for each of its hosts, or a pod
    for each GPU node.

    Args:
        job: whose run directory is a path within the containers, in a folder where the volume is
            mounted.
        image: of the containers.
        claim: name of the PersistentVolumeClaim.

    Returns:
        The text of the manifest.

    Raises:
        UserError: the run directory is no absolute path below a folder, there is no such slice of
            TPUs, or no JAX that could be installed for the target, or a value would not stay within
            its line of the manifest.
    """
    job.check()
    name, out, target = job.name, job.out, job.target
    for option, value in (("--image", image), ("--claim", claim)):
        if not re.fullmatch(r"[\w./:@-]+", value, re.ASCII):
            raise UserError(
                f"{option} {value[:80]!a} is no name of Kubernetes; write it as `kubectl` shows it"
            )
    if not out.is_absolute() or len(out.parts) < 3:
        raise UserError(
            f"--out {str(out)!r} must lie in the folder of the volume; give a path as /runs/{name}"
        )
    facts, job_name = target.facts, "slice" if target.facts.maker == "google" else "node"
    jobset = ("braeburn-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))[:40].rstrip("-")
    pods, replicas, each = target.nodes_per_slice, target.slices, target.chips_per_node
    extra = (
        f"its extra {facts.extra!r}, which `{extras.target(facts.extra)}` installs"
        if facts.extra
        else "JAX"
    )
    annotations, placement, environment, mounts, volumes = [], [], [], [], []
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
            mounts = ["- name: shared-memory", "  mountPath: /dev/shm"]
            volumes = ["# The GPUs of a node exchange data through it.", "- name: shared-memory"]
            volumes += ["  emptyDir:", "    medium: Memory"]
        else:
            environment = ["- name: JAX_PLATFORMS", "  value: cpu"]
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
        cache=json.dumps(str(out / ".cache" / "jax")),
        environment=_lines(environment, 14),
        resources=_lines(limits, 14),
        mount=json.dumps(str(out.parent)),
        mounts=_lines(mounts, 14),
        claim=json.dumps(claim),
        volumes=_lines(volumes, 12),
    )


def _lines(lines: Sequence[str], indent: int) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in lines)
