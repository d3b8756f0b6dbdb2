"""Installation, as far as it can be tested without a package index; `make test-install` does the
rest.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import braeburn as package
from braeburn.extras import how_to_install
from braeburn.hardware.catalogue import catalogue
from support import braeburn, process

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# `dev` comes with `make setup`.
WITH_TARGET = sorted(EXTRAS.keys() - {"dev"})


def make(*arguments: str) -> str:
    """What make would do."""
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that speaks to a user."""
    files = [REPOSITORY / "README.md", REPOSITORY / "Makefile", *(REPOSITORY / ".ci").iterdir()]
    for folder, pattern in (
        ("docs", "*.md"),
        ("src", "*.py"),
        ("benchmarks", "*.py"),
        ("benchmarks", "*.sh"),
    ):
        files += (REPOSITORY / folder).rglob(pattern)
    for file in files:
        yield file, file.read_text()


def test_nobody_is_sent_to_an_index_for_braeburn() -> None:
    """No index has it, and a stranger could publish a package of that name."""
    for file, text in texts():
        assert not re.search(r"pip3? install\s[^\n]*['\"\s]braeburn", text), file
        assert "braeburn[" not in text, file


def test_make_targets_that_are_named_exist() -> None:
    # The log tells what was run at its time.
    written = {file: text for file, text in texts() if file.parent.name != "log"}
    named = {
        target
        for text in written.values()
        for target in re.findall(r"`make ([a-z][a-z0-9-]*)[ `]", text)
    }
    assert {"test", "demo", "test-hf", "extra-gguf"} <= named
    database = subprocess.run(
        ["make", "-pRrq"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", database, re.MULTILINE))
    assert named <= targets, named - targets


@pytest.mark.parametrize("extra", WITH_TARGET)
def test_advice_installs_what_it_says(extra: str) -> None:
    (command,) = re.findall(r"`make ([^`]+)`", how_to_install(extra))
    # Stamps of another time must not hide what is done.
    environment = REPOSITORY / "none"
    arguments = [part for part in command.split() if not part.startswith("VENV=")]
    install = make(*arguments, f"VENV={environment}")
    assert re.search(
        rf"--constraint constraints[a-z0-9-]*\.txt --editable '\.\[(dev,)?{extra}\]'", install
    ), install


def test_advice_names_the_environment_that_runs() -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("this Python is in no environment")
    own = Path(sys.prefix) == REPOSITORY / ".venv"
    assert (f" VENV={sys.prefix}`" in how_to_install("gguf")) == (not own)


def test_every_extra_that_a_chip_needs_can_be_installed() -> None:
    assert {chip.extra for chip in catalogue().values() if chip.extra} <= set(WITH_TARGET)


def pins(file: str) -> dict[str, str]:
    """The versions that a constraints file, and the one it begins with, pin for this Python."""
    found: dict[str, str] = {}
    for line in (REPOSITORY / file).read_text().splitlines():
        if line.startswith("-c "):
            found |= pins(line.removeprefix("-c "))
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", line
                found[canonicalize_name(requirement.name)] = specifier.version
    return found


def test_pins_name_no_host() -> None:
    for file in REPOSITORY.glob("constraints*.txt"):
        text = file.read_text()
        assert "://" not in text and "--" not in text, file


def test_pins_are_complete_and_agree() -> None:
    """What `make test` installs: each package it brings is pinned, at a version that all others
    accept.
    """
    pinned = pins("constraints.txt")
    waiting = [
        Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["data"], *EXTRAS["dev"])
    ]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt lacks {requirement}"
        assert requirement.specifier.contains(pinned[name], prereleases=True), (
            requirement,
            pinned[name],
        )
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                inner = [Requirement(line) for line in metadata.requires(requirement.name) or ()]
                waiting += [
                    r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})
                ]
    heavy = [name for name, _ in seen if name.startswith(("torch", "nvidia", "jax-cuda", "triton"))]
    assert not heavy, f"make test would install {heavy}"


def test_the_version_is_that_of_the_package() -> None:
    answer = braeburn("--version")
    assert (answer.code, answer.out) == (0, f"braeburn {PROJECT['version']}\n")
    assert package.__version__ == PROJECT["version"]


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "braeburn", "recipes", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == json.loads(braeburn("recipes", "--json").out)


def test_shells_complete_commands_and_options() -> None:
    # As the script that --install-completion writes asks for it.
    for words, expected in (
        ("braeburn ex", {"explain", "export"}),
        ("braeburn train --stop", {"--stop-after-steps"}),
    ):
        environment = {"_BRAEBURN_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split()) - 1)
        answer = process(env=os.environ | environment)
        assert answer.code == 0, answer.err
        assert expected <= set(answer.out.split()), answer.out


def test_types_are_marked_as_such() -> None:
    assert Path(package.__file__).with_name("py.typed").is_file()
