"""What needs a package index: `make test-install`.

Every extra is resolved with its pins for every Python, and the wheel works in an environment that
holds nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
# Constraints file -> sets of extras that are installed together with it.
INSTALLED = {
    "constraints.txt": [("data", "dev"), ("chat", "gguf", "stablehlo")],
    "constraints-accelerators.txt": [("cuda",), ("rocm",), ("tpu",), ("dev", "compile")],
    "constraints-docs.txt": [("docs",)],
    "constraints-hf.txt": [("dev", "hf")],
    "constraints-s3.txt": [("dev", "s3", "s3-test")],
}
CASES = [(file, extras) for file, sets in INSTALLED.items() for extras in sets]

PYTHONS = ["3.11.9", "3.12", "3.13"]


def run(*command: object, **options: Any) -> str:
    """The output of a command that must succeed, without this repository on the path of Python."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **options,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def index_of_pip() -> list[str]:
    """The options that make uv ask the index that pip is set up with."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    )
    index = os.environ.get("PIP_INDEX_URL") or done.stdout.strip()
    return ["--default-index", index] if index else []


def test_every_extra_is_resolved_here() -> None:
    resolved = {extra for _, extras in CASES for extra in extras}
    assert resolved == EXTRAS.keys()
    assert {file.name for file in REPOSITORY.glob("constraints*.txt")} - {
        "constraints-llama-cpp.txt"
    } == set(INSTALLED)


def resolve(file: str, extras: tuple[str, ...], python: str) -> str:
    """The packages that pip would install, a line each, for Linux on x86-64, where all extras
    exist.

    Only descriptions of packages are fetched.
    """
    chosen = [part for extra in extras for part in ("--extra", extra)]
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-annotate",
        "--no-header",
        *chosen,
    ]
    command += [
        "--constraint",
        file,
        "--python-version",
        python,
        "--python-platform",
        "x86_64-manylinux_2_31",
    ]
    return run(*command, *index_of_pip(), "pyproject.toml", cwd=REPOSITORY)


@pytest.fixture(scope="module")
def resolutions() -> Iterator[dict[tuple[str, str], Future[str]]]:
    """Extras and Python -> what they resolve to; asked for all at once, as the index takes the
    time.
    """
    with ThreadPoolExecutor(8) as pool:
        yield {
            (",".join(extras), python): pool.submit(resolve, file, extras, python)
            for file, extras in CASES
            for python in PYTHONS
        }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("file", "extras"), CASES, ids=[",".join(extras) for _, extras in CASES])
def test_extras_resolve_with_their_pins(
    file: str, extras: tuple[str, ...], python: str, resolutions: dict[tuple[str, str], Future[str]]
) -> None:
    resolved = resolutions[",".join(extras), python].result()
    pinned = set()
    for name in {file, "constraints.txt"}:
        lines = [
            line
            for line in (REPOSITORY / name).read_text().splitlines()
            if line and line[0] not in "#-"
        ]
        pinned |= {canonicalize_name(Requirement(line).name) for line in lines}
    found = {
        canonicalize_name(Requirement(line).name) for line in resolved.splitlines() if line.strip()
    }
    assert {"jax", "jaxlib"} <= found
    if "hf" not in extras:  # torch itself pins the rest of what its builds for CUDA bring
        assert found <= pinned, f"{file} lacks {found - pinned}"


def test_the_test_environment_holds_neither_torch_nor_cuda() -> None:
    names = {canonicalize_name(found.metadata["Name"]) for found in metadata.distributions()}
    assert {"braeburn", "jax", "pytest"} <= names
    heavy = {
        name
        for name in names
        if name.startswith(("torch", "nvidia", "triton", "transformers", "jax-cuda"))
    }
    assert not heavy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        REPOSITORY,
    )
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip"]
    run(*pip, "install", "--quiet", "--constraint", REPOSITORY / "constraints.txt", wheel)
    run(*pip, "check")
    return folder


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    wanted = {
        str(path.relative_to(REPOSITORY / "src"))
        for path in (REPOSITORY / "src" / "braeburn").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "braeburn/py.typed",
        "braeburn/hardware/chips.toml",
        "braeburn/plan/page.html",
    } <= wanted
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("LICENSE") for name in names)


def test_an_installed_wheel_trains(
    environment: Path, tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("used")
    command = environment / "bin" / "braeburn"
    assert run(command, "--version", cwd=folder).startswith("braeburn ")
    assert "v5p" in json.loads(
        run(environment / "bin" / "python", "-m", "braeburn", "chips", "--json", cwd=folder)
    )
    run(
        command,
        "train",
        *tiny_arguments,
        "--out",
        folder / "run",
        "--stop-after-steps",
        2,
        cwd=folder,
    )
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert run(
        command, "generate", folder / "run", "--prompt", "def ", "--max-new-tokens", 4, cwd=folder
    )
    run(command, "plan", "llama2-7b", "--on", "h100:64", "--html", folder / "plan.html", cwd=folder)


def test_following_the_advice_helps(
    environment: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    """Where a package is missing, the message names a command that brings it."""
    if not shutil.which("make"):
        pytest.fail("make is missing")
    command = environment / "bin" / "braeburn"
    run(
        command,
        "train",
        *tiny_arguments,
        "--out",
        tmp_path / "run",
        "--stop-after-steps",
        1,
        cwd=tmp_path,
    )
    export = [
        command,
        "export",
        tmp_path / "run",
        "--format",
        "gguf",
        "--out",
        tmp_path / "model.gguf",
    ]
    refused = subprocess.run([*map(str, export)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    advice = refused.stderr.partition("`")[2].partition("`")[0]
    assert advice == f"make extra-gguf VENV={environment}", refused.stderr
    run(*advice.split(), cwd=REPOSITORY)
    run(*export, cwd=tmp_path)
    assert (tmp_path / "model.gguf").is_file()
