"""The JobSet that is printed, held against the published schemas."""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from support import PROGRAM, Answer, braeburn, process

SCHEMA = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())


def launch(on: str, *more: object, recipe: str = "llama3-8b", out: str = "/runs/first") -> Answer:
    needed = ["--out", out, "--image", "registry/braeburn:1", "--claim", "runs"]
    return braeburn("launch", "kubernetes", recipe, "--on", on, *needed, *more)


def parts(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The JobSet, its one replicated job, the pods' specification and their container, once they
    are valid.
    """
    jobset = yaml.safe_load(text)
    jsonschema.validate(jobset, SCHEMA)
    [job] = jobset["spec"]["replicatedJobs"]
    template = job["template"]
    inner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "inner"},
        "spec": template["spec"],
    }
    kubernetes_validate.validate(inner, "1.33", strict=True)
    pod = template["spec"]["template"]["spec"]
    # A pod's host name is a label of DNS.
    assert len(f"{jobset['metadata']['name']}-{job['name']}-99-9999") <= 63
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    return jobset, job, pod, container


def told(container: dict[str, Any]) -> dict[str, str]:
    """The environment of a container: values, and the fields that others are taken from."""
    return {
        variable["name"]: variable["value"]
        if "value" in variable
        else variable["valueFrom"]["fieldRef"]["fieldPath"]
        for variable in container.get("env", [])
    }


def test_slices_of_tpus() -> None:
    answer = launch("v4:8x1024", "--max-restarts", 5, recipe="afm-server")
    jobset, job, pod, container = parts(answer.out)
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert (
        job["replicas"],
        job["template"]["spec"]["completions"],
        job["template"]["spec"]["parallelism"],
    ) == (8, 256, 256)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8x16",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    # GKE tells each pod where it is. Each slice is a replica, in the stages with a mesh of their
    # own too.
    replicas = ["--set", "mesh.replica=8", "--set", "stages.context.mesh.replica=8"]
    assert container["args"] == ["afm-server", "--out", "/runs/first", *replicas]
    assert answer.out.startswith(
        "# afm-server on v4:8x1024: 8 slices of 8x8x16 chips, 256 hosts each.\n"
    )


def test_nodes_of_gpus() -> None:
    tricky = 'data.sources.web.paths=["/data/a b/*.py", "#x: y"]'
    _, job, pod, container = parts(launch("h100:16", "--set", tricky, "--set", "seed=3").out)
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (1, 2)
    assert container["command"] == ["braeburn", "train"]
    assert container["args"] == [
        *["llama3-8b", "--out", "/runs/first", "--set", tricky, "--set", "seed=3"]
    ]
    assert told(container) == {
        "JAX_COORDINATOR_ADDRESS": "braeburn-llama3-8b-node-0-0.braeburn-llama3-8b:8476",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
        "JAX_COMPILATION_CACHE_DIR": "/runs/first/.cache/jax",
    }
    assert pod["terminationGracePeriodSeconds"] == 120
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["volumeMounts"][0]["mountPath"] == "/runs"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}


@pytest.mark.parametrize(
    ("on", "pods", "limits"),
    [
        ("v6e:1", 1, {"google.com/tpu": 1}),
        ("v5p:256", 64, {"google.com/tpu": 4}),
        ("tpu7x:2x64", 16, {"google.com/tpu": 4}),
        ("h200:4", 1, {"nvidia.com/gpu": 4}),
        ("mi300x:2x16", 4, {"amd.com/gpu": 8}),
        ("mi250x:8", 2, {"amd.com/gpu": 8}),
        ("cpu:4", 4, None),
    ],
)
def test_other_targets(on: str, pods: int, limits: dict[str, int] | None) -> None:
    _, job, _, container = parts(launch(on).out)
    assert job["template"]["spec"]["completions"] == pods
    assert container.get("resources", {}).get("limits") == limits
    environment = told(container)
    assert environment.pop("JAX_COMPILATION_CACHE_DIR") == "/runs/first/.cache/jax"
    names = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    # GKE tells pods of TPUs, and JAX reads it.
    of_tpus = limits is not None and "google.com/tpu" in limits
    assert environment.keys() & names == (names if pods > 1 and not of_tpus else set())
    assert environment.keys() - names == (set() if limits else {"JAX_PLATFORMS"})


def test_json_and_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = json.loads(launch("v6e:16", "--json").out)
    assert (
        "no JAX for AWS Trainium2 can be installed: Neuron PJRT plugin is no extra"
        in launch("trainium2:64").error
    )
    assert answer["submitted"] is None and answer["manifest"] == launch("v6e:16").out
    assert (
        "--out 'runs/x' must lie in the folder of the volume; give a path as /runs/x"
        in launch("h100:8", out="runs/x").error
    )
    assert (
        "there is no slice of 24 v6e chips; use 16 or 32"
        in launch("v6e:24", "--set", "mesh.fsdp=8").error
    )
    assert (
        "the 1024 sequences of a batch cannot be split into 2048 equal parts"
        in launch("v5p:2048").error
    )
    assert (
        "'afm-tinny' is not a recipe"
        in braeburn(
            "launch",
            "kubernetes",
            "afm-tinny",
            "--on",
            "cpu:2",
            "--out",
            "/r/x",
            "--image",
            "i",
            "--claim",
            "c",
        ).error
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        "--submit needs 'kubectl', which is not on the PATH; run this where it is"
        in launch("v6e:16", "--submit").error
    )
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        '#!/bin/sh\n[ "$*" = "apply -f -" ] || exit 9\nread line\necho "got: $line"\n'
    )
    kubectl.chmod(0o755)
    assert (
        launch("v6e:16", "--submit").out
        == "got: # llama3-8b on v6e:16: 1 slice of 4x4 chips, 4 hosts each.\n"
    )
    kubectl.write_text(
        "#!/bin/sh\necho 'error: the server\ncould not find the requested resource' >&2\nexit 1\n"
    )
    assert launch("v6e:16", "--submit").error == (
        "error: kubectl refused the job (the server could not find the requested resource)"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--image", "i\nprivileged: true"],
            r"--image 'i\nprivileged: true' is no name of Kubernetes; write it as",
        ),
        (["--claim", "c: d"], "--claim 'c: d' is no name of Kubernetes"),
        (
            ["--out", "/runs/a\nb: c"],
            r"--out '/runs/a\nb: c' has a line break or control character; write it without",
        ),
        (["--set", 'name="a\\nb"'], r"name: 'a\nb' cannot be a name"),
    ],
)
def test_nothing_that_is_given_becomes_a_line_of_its_own(
    arguments: list[str], sentence: str
) -> None:
    assert sentence in launch("cpu:2", *arguments, recipe="afm-tiny").error


def test_a_run_at_a_url_needs_no_volume() -> None:
    needed = ["--out", "s3://bucket/run", "--image", "registry/braeburn:1"]
    command = ["launch", "kubernetes", "llama3-8b", "--on", "h100:8"]
    cached = ["--set", "data.cache=s3://bucket/tokens"]
    answer = braeburn(*command, *needed, *cached)
    _, job, pod, container = parts(answer.out)
    assert job["template"]["spec"]["completions"] == 1
    assert container["args"][:3] == ["llama3-8b", "--out", "s3://bucket/run"]
    assert "env" not in container
    assert [volume["name"] for volume in pod["volumes"]] == ["shared-memory"]
    assert (
        "#   --out s3://bucket/run: the run directory, which processes write together; each needs "
        "the credentials\n"
    ) in answer.out
    assert answer.err.startswith("warning: data.sources.web.paths=")
    assert "is a path, and this job has no volume; make sure that the image has it" in answer.err
    assert (
        "--claim c is for a run directory in a volume"
        in braeburn(*command, *needed, "--claim", "c").error
    )
    assert (
        "--out 's3://bucket/run' cannot be written by 2 pods"
        in braeburn(*command[:-1], "h100:16", *needed).error
    )
    needed[1] = "/runs/first"
    assert (
        "--claim is missing; name the PersistentVolumeClaim for the folder '/runs'"
        in braeburn(*command, *needed).error
    )


def start(on: str, *words: object, claim: str | None = "runs") -> Answer:
    """Launches a command on a trained model."""
    needed = ["--image", "registry/braeburn:1", *(["--claim", claim] if claim else [])]
    return braeburn("launch", "kubernetes", "--on", on, *needed, *words)


def test_evaluation_on_nodes_of_gpus() -> None:
    words = ["evaluate", "/runs/AFM 1", "--data", "/runs/$(X)$$.txt", "--mesh", "fsdp=-1"]
    answer = start("h100:16", "--max-restarts", 1, "--", *words)
    assert (answer.code, answer.err) == (0, "")
    jobset, job, pod, container = parts(answer.out)
    name = jobset["metadata"]["name"]
    assert name == "braeburn-evaluate-afm-1"
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (1, 2)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 1
    assert container["command"] == ["braeburn", "evaluate"]
    # Kubernetes makes one of two `$`.
    assert [text.replace("$$", "$") for text in container["args"]] == words[1:]
    assert told(container) == {
        "JAX_COMPILATION_CACHE_DIR": "/runs/AFM 1/.cache/jax",
        "JAX_COORDINATOR_ADDRESS": f"{name}-node-0-0.{name}:8476",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    }
    assert container["volumeMounts"][0]["mountPath"] == "/runs"
    assert "terminationGracePeriodSeconds" not in pod
    assert "checkpoint" not in answer.out and "started anew, from the beginning" in answer.out
    assert "#   DIR /runs/AFM 1: the run directory\n#   --data /runs/$(X)$$.txt: text" in answer.out
    assert (
        f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0,"
        f"batch.kubernetes.io/job-completion-index=0"
    ) in answer.out
    whole = json.loads(start("h100:16", "--max-restarts", 1, "--json", "--", *words).out)
    assert whole["manifest"] == answer.out and whole["submitted"] is None
    assert [place["field"] for place in whole["shared"]] == ["DIR", "--data"]


@pytest.mark.deep
def test_pods_that_are_told_so_evaluate_together(finished: Path) -> None:
    """Two processes with the command and the environment of the pods, and this machine's names."""
    words = ["evaluate", finished, "--json"]
    expected = json.loads(process(*words).out)["results"]
    _, _, _, container = parts(start("cpu:2", "--", *words, "--mesh", "fsdp=-1").out)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environ = told(container) | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_CPU_DEVICES": "4"}
    [_, command] = container["command"]
    pods = [
        subprocess.Popen(
            [*PROGRAM, command, *container["args"]],
            env=os.environ | environ | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    printed = [pod.communicate(timeout=200)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0]
    assert printed[1] == ""
    found = json.loads(printed[0])["results"]
    for source, values in expected.items():
        assert found[source]["loss"] == pytest.approx(values["loss"], rel=1e-5)


@pytest.mark.parametrize("prompt", ["\U0001f34e and é", 'two\nlines: "a"\t', "\x7f\u2028\x85 \\"])
def test_any_text_is_an_argument(prompt: str) -> None:
    words = ["generate", "/runs/afm", "--mesh", "fsdp=-1", "--prompt", prompt]
    _, _, _, container = parts(start("v6e:16", "--", *words).out)
    assert container["args"] == words[1:]


def test_generation_on_a_slice_of_tpus() -> None:
    words = ["generate", "/runs/afm", "--prompts", "/text/prompts.txt", "--mesh", "fsdp=-1"]
    answer = start("v5p:64", "--", *words)
    _, job, pod, container = parts(answer.out)
    assert job["template"]["spec"]["completions"] == 16
    assert told(container).keys() == {"JAX_COMPILATION_CACHE_DIR"}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    [warning] = answer.err.splitlines()
    assert warning.startswith("warning: --prompts '/text/prompts.txt' is not below '/runs', where")
    assert warning.endswith("make sure that the image has it, or move it below '/runs'")


def test_one_process_that_leaves_devices_alone_is_warned_of() -> None:
    words = ["evaluate", "/runs/afm"]
    answer = start("h100:8", "--", *words)
    assert answer.code == 0 and "JAX_NUM_PROCESSES" not in answer.out
    assert answer.err.startswith(
        "warning: evaluate uses one of the 8 devices of h100:8; add --mesh"
    )
    assert start("h100:8", "--", *words, "--mesh", "fsdp=-1").err == ""
    assert start("h100:1", "--", *words).err == ""


def test_where_the_volume_of_a_command_is() -> None:
    export = ["export", "/runs/a/afm", "--out", "/runs/b/afm"]
    assert start("cpu:2", "--", *export).error.endswith(
        "--out '/runs/b/afm' is in no volume and would be lost with the pod; name a path below "
        "'/runs/a', or another folder for the volume with --mount"
    )
    _, _, _, container = parts(start("cpu:2", "--mount", "/runs", "--", *export).out)
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert "--mount '/' is no folder" in start("cpu:2", "--mount", "/", "--", *export).error
    assert "--mount 'runs' is no folder" in start("cpu:2", "--mount", "runs", "--", *export).error

    at_url = ["export", "s3://bucket/afm", "--out", "/runs/afm-hf"]
    assert "add a volume that holds it, with --claim and --mount" in (
        start("cpu:1", "--", *at_url, claim=None).error
    )
    assert "say with --mount where the volume is to be" in start("cpu:1", "--", *at_url).error
    _, _, _, container = parts(start("cpu:1", "--mount", "/runs", "--", *at_url).out)
    assert told(container) == {"JAX_PLATFORMS": "cpu"}

    evaluate = ["evaluate", "s3://bucket/afm", "--mesh", "fsdp=-1"]
    answer = start("v6e:16", "--", *evaluate, claim=None)
    assert "env" not in parts_without_volume(answer.out)
    relative = ["evaluate", "runs/afm", "--mesh", "fsdp=-1"]
    assert "DIR='runs/afm' must lie in the folder of the volume; give a path as /runs/afm" in (
        start("v6e:16", "--", *relative).error
    )
    relative[1] = "/runs/afm"
    assert start("v6e:16", "--", *relative).code == 0
    assert "--claim is missing; name the PersistentVolumeClaim for the folder '/runs' of DIR" in (
        start("v6e:16", "--", *relative, claim=None).error
    )


def parts_without_volume(text: str) -> dict[str, Any]:
    """The container of a valid JobSet without a volume."""
    jobset = yaml.safe_load(text)
    jsonschema.validate(jobset, SCHEMA)
    [job] = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert "volumes" not in pod
    [container] = pod["containers"]
    return container


def test_paths_that_containers_would_not_have_are_warned_of() -> None:
    changes = ["--set", "initial_weights=/models/base", "--set", "data.tokenizer=/runs/t.json"]
    answer = launch("h100:16", *changes)
    assert answer.code == 0
    told = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    assert [line.split("=")[0] for line in told] == [
        "warning: data.cache",
        "warning: data.sources.web.paths",
        "warning: initial_weights",
    ]
    assert "lose it; add --set data.cache=/runs/tokens" in told[0]
    assert "is not below '/runs', where the volume is mounted; make sure that" in told[2]
    # The advice works.
    advised = ["--set", "data.cache=/runs/tokens", "--set", "initial_weights=/runs/base"]
    sources = ["--set", 'data.sources.web.paths=["/runs/text/*.jsonl"]']
    assert launch("h100:16", *advised, *sources).err == ""
