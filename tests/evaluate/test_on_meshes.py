"""Evaluation on several devices gives what one device gives."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.cli.resolve import parse_mesh
from braeburn.train.trained import load
from support import braeburn, process


def results(directory: Path, *arguments: Any) -> dict[str, Any]:
    answer = braeburn("evaluate", directory, "--json", *arguments)
    assert answer.code == 0, answer.err
    return json.loads(answer.out)["results"]


@pytest.fixture(scope="module")
def on_one(finished: Path) -> dict[str, Any]:
    return results(finished)


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=2,tensor=2",
        "context=2",
        pytest.param("fsdp=8", marks=pytest.mark.deep),
        pytest.param("data=2,tensor=4", marks=pytest.mark.deep),
    ],
)
def test_held_out_text_on_a_mesh(mesh: str, finished: Path, on_one: dict[str, Any]) -> None:
    found = results(finished, "--mesh", mesh)
    assert found.keys() == on_one.keys()
    for source, expected in on_one.items():
        assert found[source]["tokens"] == expected["tokens"]
        assert found[source]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found[source]["accuracy"] == pytest.approx(expected["accuracy"], abs=2e-4)


def test_short_files_and_overlapping_windows_on_a_mesh(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("for line in sys.stdin:\n    print(line)\n" * 20)
    options = ("--data", file, "--sequence-length", 48, "--stride", 16)
    (expected,) = results(finished, *options).values()
    (found,) = results(finished, *options, "--mesh", "data=2,context=2").values()
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])


def test_several_processes_share_a_model(
    finished: Path, tmp_path: Path, on_one: dict[str, Any]
) -> None:
    """Two processes of four devices each, which `launch local` starts."""
    arguments = ["evaluate", finished, "--json", "--by-position", "--mesh", "fsdp=4,tensor=2"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    answer = process("launch", "local", "--processes", "2", "--", *arguments, env=environment)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["results"]
    for source, expected in on_one.items():
        assert found[source]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        parts = found[source]["by_position"]
        assert sum(part["tokens"] for part in parts) == expected["tokens"]


def test_several_processes_need_a_mesh(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert "2 processes, which share a model over --mesh alone; add --mesh fsdp=-1" in (
        braeburn("evaluate", finished).error
    )


@pytest.fixture(scope="module")
def half(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is stored in bfloat16: an import of an export."""
    folder = tmp_path_factory.mktemp("half")
    for arguments in (
        ("export", finished, "--out", folder / "hf", "--dtype", "bf16"),
        ("import", folder / "hf", "--out", folder / "run"),
    ):
        assert braeburn(*arguments).code == 0
    return folder / "run"


@pytest.mark.parametrize("mesh", [(), ("--mesh", "fsdp=2,tensor=2")])
def test_weights_held_in_bfloat16_compute_the_same(
    mesh: tuple[str, ...], half: Path, tmp_path: Path
) -> None:
    """What was imported in bfloat16 stays so on the devices, and float32 would change nothing."""
    file = tmp_path / "a.txt"
    file.write_text("def f(x):\n    return x + 1\n" * 30)
    options = ("--data", file, "--sequence-length", 64, *mesh)
    assert results(half, *options) == results(half, *options, "--dtype", "fp32")
    held = load(half, parse_mesh(mesh[1]) if mesh else None, for_programs=True).params
    assert held["layers"]["gate"].dtype == np.uint16
    assert held["embedding"].dtype == jax.numpy.bfloat16
    assert held["final_norm"].dtype == np.float32
    assert load(half).params["layers"]["gate"].dtype == jax.numpy.bfloat16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["afm-tiny"], "--out is missing; name the run directory, as in --out runs/first"),
        (["afm-tiny", "x", "--out", "y"], "'x' is one argument too many"),
        (["evaluate", "DIR", "--json"], "--json of launch local is of training alone"),
        (["--", "evaluate", "DIR"], "2 processes, which share a model over --mesh alone"),
        (["--", "evaluate", "DIR", "--mesh", "fsdp=3"], "fsdp"),
    ],
)
def test_jobs_that_cannot_be_launched(arguments: list[str], sentence: str, finished: Path) -> None:
    given = [str(finished) if word == "DIR" else word for word in arguments]
    assert sentence in braeburn("launch", "local", "--processes", "2", *given).error


def test_each_device_gets_its_part(finished: Path) -> None:
    trained = load(finished, parse_mesh("fsdp=2,tensor=2"))
    (matrix,) = (leaf for leaf in jax.tree.leaves(trained.params["layers"]["gate"]))
    assert len(matrix.addressable_shards) == 4
    assert matrix.addressable_shards[0].data.size * 4 == matrix.size


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("fsdp", "--mesh 'fsdp' is not a list of axes with their sizes; write it as --mesh fsdp=2"),
        ("sideways=2", "sideways"),
        ("fsdp=16", "needs 16 devices but 8 are there"),
        ("fsdp=3", "model parameter"),
        ("tensor=8,fsdp=-1", "tensor"),
        ("fsdp=two", "--mesh 'fsdp=two': fsdp='two' is not valid: it should be a valid integer"),
        ("fsdp=2,fsdp=4", "--mesh 'fsdp=2,fsdp=4' names fsdp twice; name it once"),
        (
            "expert=2,expert_dispatch=sent",
            "expert_dispatch='sent' is not valid: it should be 'gather' or 'all_to_all'",
        ),
        ("expert=2,expert_dispach=gather", "did you mean 'expert_dispatch'"),
        pytest.param(f"fsdp={'9' * 5000}", "fsdp='999999", id="thousands of digits"),
    ],
)
def test_meshes_that_do_not_fit(mesh: str, sentence: str, finished: Path) -> None:
    assert sentence in braeburn("evaluate", finished, "--mesh", mesh).error


def test_windows_that_do_not_come_out_even(finished: Path) -> None:
    answer = braeburn("evaluate", finished, "--mesh", "context=4", "--sequence-length", "100")
    assert "set --sequence-length to a multiple of 8" in answer.error
