"""Calls of the command line, and what is looked for in run directories."""

import contextlib
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from braeburn import remote
from braeburn.cli import main
from braeburn.config import Run, Source

PROGRAM = [sys.executable, "-c", "from braeburn.cli import console; console()"]


# A recipe that trains on from the weights at a path.
TRAINS_ON = """
from braeburn.config import ModelConfig
from braeburn.recipes import load


def more():
    run = load("afm-tiny")
    model = ModelConfig.from_directory({path!r})
    return run.model_copy(update={{"model": model, "initial_weights": {path!r}}})
"""


@dataclass(frozen=True)
class Answer:
    """What a call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence that a mistake is answered with."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        *log, line = self.err.splitlines()
        assert line.startswith("error: ")
        assert not [earlier for earlier in log if earlier.startswith("error")]
        return line


def braeburn(*arguments: object) -> Answer:
    """Calls the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        before, sys.argv = sys.argv, ["braeburn", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue())


def process(*arguments: object, timeout: float = 300, **options: Any) -> Answer:
    """Calls the command line in a process of its own."""
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def together(
    *programs: list[str],
    devices: int,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
) -> list[Answer]:
    """Runs one program in each of several processes, which the environment tells of each other.

    Args:
        programs: of each process, with its arguments.
        devices: that each process has.
        timeout: in seconds.
        environment: what the environment has besides.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    found = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(len(programs))}
    members = [
        subprocess.Popen(
            program,
            env=os.environ
            | found
            | dict(environment or {})
            | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, program in enumerate(programs)
    ]
    try:
        outputs = [member.communicate(timeout=timeout) for member in members]
    finally:
        for member in members:
            member.kill()
    return [
        Answer(member.returncode, out, err)
        for member, (out, err) in zip(members, outputs, strict=True)
    ]


@contextlib.contextmanager
def empty_bucket() -> Iterator[Any]:
    """An empty file system that is no disk, which this process has not met."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    remote._reached.clear()
    yield filesystem
    filesystem.store.clear()


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def token_shards(cache: Path) -> dict[str, str]:
    """The hash of every file of the token shards in a cache, by its name."""
    found = contents(cache / "stores").items()
    return {name: value for name, value in found if not name.endswith("verified.json")}


def on_json_lines(run: Run, folder: Path, cache: object, **data: object) -> Run:
    """The first stage of a run alone, on the files of a folder as the source "web"."""
    stage = next(iter(run.stages.values())).model_copy(update={"mixture": {"web": 1.0}})
    fields = {"sources": {"web": Source(paths=(str(folder),))}, "cache": str(cache), **data}
    return run.model_copy(
        update={"data": run.data.model_copy(update=fields), "stages": {"core": stage}}
    )


def rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def damage(path: Path, harm: str) -> None:
    """Harms a file: "remove" it, "flip" a bit in its middle, or "truncate" it by a byte, with that
    bit flipped.
    """
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if harm == "flip" else data[:-1])


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's `events.jsonl`."""
    found = []
    for line in (directory / "events.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut short where a test killed the process
            found.append(json.loads(line))
    return [event for event in found if event["event"] == kind]


def deep_but(often: Container[str], names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test, marked `deep` but for those that are tested often."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.deep) for name in names]


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar in the event files of a folder, in the order in which TensorBoard reads them."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            content = data[at + 12 : at + 12 + length]
            for start, checked in ((at + 8, data[at : at + 8]), (at + 12 + length, content)):
                assert int.from_bytes(data[start : start + 4], "little") == masked_crc32c(checked)
            event = event_pb2.Event.FromString(content)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
        assert at == len(data)
    return found
