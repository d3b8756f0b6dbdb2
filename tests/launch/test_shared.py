"""Processes whose run directories should be one folder, and are not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from braeburn.train.directory import RunDirectory

IMPATIENT = (
    "import braeburn.train.preparation as preparation\n"
    "preparation.SECONDS_TO_APPEAR = 1.0\n"
    "from braeburn.cli import console\n"
    "console()"
)


def test_a_mark_tells_folders_apart(tmp_path: Path) -> None:
    one, same, other = (RunDirectory(tmp_path / name) for name in ("a", "a", "b"))
    with one.claim(), other.claim():
        mark = one.leave_mark()
        assert mark and same.has_mark(mark, 0.0)
        assert not other.has_mark(mark, 0.0) and other.has_mark("", 0.0)
        other.leave_mark()
        assert not other.has_mark(mark, 0.0)


@pytest.mark.deep
def test_a_folder_for_each_process_is_refused(tiny_arguments: list[str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for number in range(2):
        folder = tmp_path / f"machine {number}"
        folder.mkdir()
        command = [
            sys.executable,
            "-c",
            IMPATIENT,
            "train",
            *tiny_arguments,
            "--set",
            "mesh.fsdp=2",
        ]
        command += ["--out", "run", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
        command += ["--process-id", f"{number}"]
        running.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert "--out 'run' is another folder for process 1 than for process 0; name a fol" in err
    assert [path.name for path in tmp_path.glob("*/run/*") if path.name != ".lock"] == []
