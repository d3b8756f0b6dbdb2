"""The examples of docs/extending.md, written into a copy of the sources and run as they stand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import braeburn
from support import deep_but

SOURCE = Path(braeburn.__file__).parent
PAGE = SOURCE.parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def sections() -> dict[str, list[tuple[str, str]]]:
    """The blocks of each section, as (language, text), in order."""
    titled = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        title: BLOCK.findall(text) for title, text in zip(titled[::2], titled[1::2], strict=True)
    }


SECTIONS = sections()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the sources, which the sections extend one after the other."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(SOURCE, folder / "src" / "braeburn", ignore=shutil.ignore_patterns("__pyc*"))
    return folder


def write(folder: Path, title: str) -> list[str]:
    """Writes the files of a section where their first lines say, and returns its commands."""
    commands: list[str] = []
    for language, text in SECTIONS[title]:
        if language == "sh":
            commands += text.replace("\\\n", "").strip().splitlines()
            continue
        path = folder / text.splitlines()[0].removeprefix("# ")
        assert not path.exists(), f"{path} is edited, not added"
        path.write_text(text.partition("\n")[2], encoding="utf-8")
    return commands


# The last is quick, and loads what all sections add.
@pytest.mark.parametrize("title", deep_but(list(SECTIONS)[-1:], SECTIONS))
def test_an_example_runs(title: str, copy: Path) -> None:
    for other in list(SECTIONS)[: list(SECTIONS).index(title) + 1]:
        written = copy / f".{other}"
        if not written.exists():
            written.write_text("\n".join(write(copy, other)))
    environment = os.environ | {
        "PYTHONPATH": str(copy / "src"),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    for line in (copy / f".{title}").read_text().splitlines():
        command, *arguments = shlex.split(line)
        assert command == "braeburn"
        done = subprocess.run(
            [sys.executable, "-m", command, *arguments],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"


def test_every_kind_has_its_section() -> None:
    kinds = ["A kind of layer", "A family", "An objective", "An optimizer", "A transform", "A chip"]
    assert list(SECTIONS) == kinds
    assert all(any(language == "sh" for language, _ in blocks) for blocks in SECTIONS.values())
