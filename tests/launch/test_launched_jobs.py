"""The arguments of commands on a trained model, which launchers check before anything starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from braeburn.cli.command import app
from braeburn.launch.job import JOBS
from braeburn.launch.places import PARAMETERS, home_of_command, places_of_command
from support import Answer, braeburn

LAUNCHERS = {
    "local": ["--processes", 8],
    "slurm": ["--on", "h100:8"],
    "kubernetes": ["--on", "h100:64", "--image", "image", "--claim", "runs"],
}
EVALUATE = ["evaluate", "/runs/afm", "--mesh", "fsdp=-1"]
GENERATE = ["generate", "/runs/afm", "--mesh", "fsdp=-1"]


def launch(launcher: str, *words: object, needed: Sequence[object] | None = None) -> Answer:
    given = LAUNCHERS[launcher] if needed is None else needed
    return braeburn("launch", launcher, *given, *words)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a test fail where `launch local` starts processes."""

    def start(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("braeburn.launch.local.launch_job", start)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluate"], "Missing argument 'DIR'; `braeburn evaluate --help` lists"),
        ([*EVALUATE, "--messh", "fsdp=8"], "No such option: --messh"),
        ([*EVALUATE, "--stride", "0"], "Invalid value for '--stride'"),
        ([*EVALUATE, "--dtype", "fp8"], "--dtype 'fp8' is not known; use --dtype fp32"),
        (["evaluate", "/runs/afm"], "8 processes, which share a model over --mesh alone"),
        (["evaluate", "/runs/afm", "--mesh", "fsdp"], "--mesh 'fsdp' is not a list of axes"),
        (["evaluate", "/runs/afm", "--mesh", "tensr=8"], "did you mean 'tensor'"),
        (GENERATE, "there is no prompt; give one with --prompt TEXT"),
        ([*GENERATE, "--prompt", "-"], "--prompt - is standard input, which processes that are"),
        ([*GENERATE, "--prompts", "-"], "--prompts - is standard input"),
        ([*GENERATE, "--prompts", "s3://a/b"], "--prompts 's3://a/b' is a URL, and prompts are"),
        (["export", "/runs/afm"], "Missing option '--out'"),
        (["export", "/runs/afm", "--out", "/runs/a.gguf"], "add --format gguf"),
        (["export", "/runs/afm", "--out", "s3://a/b"], "--out 's3://a/b' is a URL, and 8 proces"),
        (["export", "s3:/a/b", "--out", "/runs/b"], "DIR='s3:/a/b' is no URL; write two slashes"),
        (["export", "/runs/afm", "--out", "/runs/a", "--type", "q8_0"], "is one of --format gguf"),
    ],
)
def test_arguments_that_the_command_would_refuse(
    launcher: str, words: list[str], sentence: str
) -> None:
    answer = launch(launcher, "--", *words)
    assert sentence in answer.error
    assert answer.out == ""


@pytest.mark.parametrize("launcher", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("fsdp=128", "mesh (fsdp=128) needs 128 devices but"),
        ("tensor=3,fsdp=-1", "mesh.tensor=3 does not divide the"),
        ("fsdp=2", "mesh has 2 devices but the 8 processes have"),
    ],
)
def test_meshes_that_do_not_fit_the_target(launcher: str, mesh: str, sentence: str) -> None:
    error = launch(launcher, "--", "evaluate", "/runs/afm", "--mesh", mesh).error
    assert f"--mesh {mesh!r} does not fit h100:" in error and sentence in error
    # The advice works.
    assert launch(launcher, "--", *EVALUATE).code == 0


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_options_on_the_wrong_side(launcher: str) -> None:
    example = " ".join(["braeburn launch", launcher])
    error = launch(launcher, *EVALUATE).error
    assert (
        f"--mesh is no option of launch {launcher}; write -- before evaluate, and its options "
        f"behind it, as in {example} "
    ) in error
    # The example is one that works, with names in the place of its own.
    _, _, advised = error.partition(f"launch {launcher} ")
    if launcher != "local":
        names = {"DIR": "/runs/afm", "IMAGE": "image", "NAME": "runs"}
        words = [names.get(word, word) for word in advised.split()]
        assert launch(launcher, *words, needed=[]).code == 0

    export = ["export", "/runs/afm", "--out", "/runs/afm-hf"]
    assert (
        f"--out of launch {launcher} is of training alone; leave it out, or write it behind "
        f"-- export, as in {example} "
    ) in launch(launcher, *export).error
    assert f"--set of launch {launcher} is of training" in (
        launch(launcher, "--set", "seed=1", "--", *EVALUATE).error
    )


def test_what_is_no_command() -> None:
    assert "--prepare of launch slurm is of training alone; leave it out" in (
        launch("slurm", "--prepare", 3, "--", *EVALUATE).error
    )
    for launcher in LAUNCHERS:
        assert "--out is missing; name the run directory" in launch(launcher, "afm-tiny").error
        error = launch(launcher, "--", "report", "/runs/afm").error
        assert "'/runs/afm' is one argument too many behind 'report'; name one recipe" in error
        assert f"one of the commands {', '.join(JOBS)} with its arguments" in error


def test_the_help_of_a_command_behind_a_launcher() -> None:
    answer = launch("slurm", "--", "evaluate", "--help")
    assert answer.code == 0 and "braeburn evaluate" in answer.out


@pytest.mark.parametrize("command", JOBS)
def test_the_paths_of_every_command_are_known(command: str) -> None:
    """A parameter that names a path is one of those whose places are told."""
    group: Any = typer.main.get_command(app)
    parameters = group.commands[command].params
    paths = [each.name for each in parameters if each.metavar in ("DIR", "HF_DIR", "FILE", "PATH")]
    assert set(paths) <= set(PARAMETERS)
    places = places_of_command({name: f"/runs/{name}" for name in paths})
    assert len(places) == len(paths)
    assert home_of_command(places).path in ("/runs/directory", "/runs/out")


def test_places_of_values() -> None:
    values = {"directory": "d", "data": ["a", "b"], "more": ["c"], "prompts": None, "field": "f"}
    assert [place.path for place in places_of_command(values)] == ["d", "a", "b", "c"]
    made = places_of_command({"hf_dir": "hf", "out": "run"})
    assert [place.read for place in made] == [True, False]
    assert home_of_command(made).path == "run"


def test_a_run_that_is_not_there_is_a_doubt(tmp_path: Path) -> None:
    answer = launch("slurm", "--", *EVALUATE)
    assert answer.code == 0
    assert answer.err.startswith("warning: DIR='/runs/afm' is not there, as seen from this machine")
    assert f"warning: DIR='{tmp_path}' lies in" in (
        launch("slurm", "--", "evaluate", tmp_path, "--mesh", "fsdp=-1").err
    )
