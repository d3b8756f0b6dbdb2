"""The JobSet that is printed, held against the published schemas."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from support import Answer, braeburn

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
    assert container["args"] == [
        *["llama3-8b", "--out", "/runs/first", "--set", tricky, "--set", "seed=3"],
        *[
            "--coordinator",
            "braeburn-llama3-8b-node-0-0.braeburn-llama3-8b:8476",
            "--num-processes",
            "2",
        ],
        *["--process-id", "$(JOB_COMPLETION_INDEX)"],
    ]
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
    assert ("--coordinator" in container["args"]) == (
        limits is None or "google.com/tpu" not in limits
    ) * (pods > 1)
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment.pop("JAX_COMPILATION_CACHE_DIR") == "/runs/first/.cache/jax"
    assert environment == ({} if limits else {"JAX_PLATFORMS": "cpu"})


def test_json_and_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = json.loads(launch("v6e:16", "--json").out)
    assert (
        "no JAX for AWS Trainium2 can be installed: Neuron PJRT plugin is no extra"
        in launch("trainium2:64").error
    )
    assert answer["submitted"] is None and answer["manifest"] == launch("v6e:16").out
    assert (
        "--out 'runs/x' must lie in the folder of the volume; give a path as /runs/llama3-8b"
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
