"""Runs and models on a real S3 server, moto's, which cannot be reached for half a minute.

`make test-s3` installs what it needs and runs it.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import s3fs

from braeburn.config import read_run
from braeburn.layers.spec import abstract
from braeburn.models import decoder
from braeburn.remote import RemoteFolder
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.remote_run import steps_of
from launch.together import members
from s3_server import OUTAGE_SECONDS, Proxy, free_port, proxy
from support import PROGRAM, braeburn, contents, events, process, rows

__all__ = ["proxy"]  # a fixture

STEPS = 60
RECIPE = """
from braeburn.config import Run, Source
from braeburn.recipes import load


def run() -> Run:
    base = load("afm-tiny")
    core = base.stages["core"].model_copy(update={"mixture": {"web": 1.0}})
    data = base.data.model_copy(update={"sources": {"web": Source(paths=(FOLDER,))}})
    return base.model_copy(update={"stages": {"core": core}, "data": data})
"""
FIELDS = {
    "data.cache": "s3://bucket/tokens",
    "stages.core.tokens": STEPS * 1024,
    "stages.core.schedule.warmup_steps": 2,
    "checkpoint.every_steps": 5,
    "evaluation.tokens": 2048,
    "mesh.fsdp": 1,
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy) -> list[str]:
    """A run of sixty steps on text that is prepared on the server; its sources are gone."""
    folder = tmp_path_factory.mktemp("text")
    lines = (json.dumps({"text": f"line {i} of a text " * (5 + i % 7)}) + "\n" for i in range(9000))
    (folder / "a.jsonl").write_text("".join(lines))
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.py"
    recipe.write_text(RECIPE.replace("FOLDER", repr(str(folder))))
    changes = [f"{path}={json.dumps(value)}" for path, value in FIELDS.items()]
    found = [f"{recipe}:run", *(part for change in changes for part in ("--set", change))]
    answer = braeburn("prepare", *found)
    assert answer.code == 0, answer.err
    (folder / "a.jsonl").unlink()
    return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Goes on as on another machine, which has met none of what is in S3."""

    def change(number: int) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine {number}"))

    change(1)
    return change


@pytest.fixture(scope="module")
def local(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, trained on the local disk without interruption."""
    directory = tmp_path_factory.mktemp("local") / "run"
    answer = braeburn("train", *arguments, "--out", directory)
    assert answer.code == 0, answer.err
    return directory


def url(tmp_path: Path, name: str = "run") -> str:
    return f"s3://bucket/{tmp_path.name}/{name}"


def begin(arguments: list[str], out: str, *more: object) -> subprocess.Popen[str]:
    command = [*PROGRAM, "train", *arguments, "--out", out, *map(str, more)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], Any], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def checkpoints_at(out: str) -> list[int]:
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    root = out.removeprefix("s3://")
    return steps_of(name[len(root) + 1 :] for name in filesystem.find(root))


def fetched(out: str, target: Path) -> Path:
    """All that is at a URL, as files."""
    folder = RemoteFolder(out, "--out")
    list(folder.fetch_all(folder.list(), target))
    return target


def losses(directory: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(directory)]


def same_weights(left: Path, right: Path, step: int) -> bool:
    specs = decoder.param_specs(read_run(left).model)
    one, other = (Checkpoints(d).restore_params(step, abstract(specs)) for d in (left, right))
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_an_outage_a_kill_and_another_machine(
    arguments: list[str], local: Path, proxy: Proxy, tmp_path: Path, machine: Any
) -> None:
    """Half a minute without the server while the run trains; then a kill; then another machine."""
    out = url(tmp_path)
    running = begin(arguments, out)
    wait_for(lambda: checkpoints_at(out), running)
    refused = proxy.refused
    proxy.outage(OUTAGE_SECONDS)
    assert proxy.refused > refused
    assert running.poll() is None  # it waits for the server, with steps to make or to copy
    wait_for(lambda: checkpoints_at(out)[-1] > 5, running)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert checkpoints_at(out)[-1] < STEPS
    machine(2)
    answer = process("train", *arguments, "--out", out)
    assert answer.code == 0, answer.err
    copy = fetched(out, tmp_path / "copy")
    assert losses(copy) == losses(local)
    assert len(events(copy, "resume")) == 1
    assert steps_of(contents(copy)) == [STEPS - 5, STEPS]
    assert same_weights(copy, local, STEPS)
    assert Checkpoints(copy).fault(STEPS) is None


def test_kills_at_any_moment(
    arguments: list[str], local: Path, tmp_path: Path, machine: Any
) -> None:
    """Killed again and again, on one machine and on others, and never a step is lost or doubled."""
    out = url(tmp_path)
    for number, (steps, on) in enumerate([(2, 1), (9, 1), (17, 2), (26, 3), (31, 3), (44, 1)]):
        machine(on)
        running = begin(arguments, out)
        cache = Path(os.environ["XDG_CACHE_HOME"])

        def made(steps: int = steps, cache: Path = cache) -> bool:
            for path in cache.glob("braeburn/runs/*/metrics.jsonl"):
                if f'"step": {steps},' in path.read_text():
                    return True
            return False

        wait_for(made, running)
        time.sleep(0.1 * number)
        running.kill()
        running.communicate()
        for step in checkpoints_at(out):  # whole, whenever the kill came
            copy = tmp_path / f"{number} {step}"
            fetched(f"{out}/checkpoints/{step}", copy / "checkpoints" / str(step))
            assert Checkpoints(copy).fault(step) is None
    machine(4)
    answer = process("train", *arguments, "--out", out)
    assert answer.code == 0, answer.err
    copy = fetched(out, tmp_path / "copy")
    assert losses(copy) == losses(local)
    assert same_weights(copy, local, STEPS)


def test_several_processes_of_one_machine(
    arguments: list[str], tmp_path: Path, machine: Any
) -> None:
    """Two processes, of which one is killed; then one process on another machine."""
    out = url(tmp_path)
    mesh = ["--set", "mesh.fsdp=2", "--set", "stages.core.tokens=30720"]
    many = ["launch", "local", *arguments, *mesh, "--processes", 2, "--json", "--out"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    answer = process(*many, tmp_path / "local", env=environment)
    assert answer.code == 0, answer.err
    command = [*PROGRAM, *map(str, many), out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, env=environment, **pipes)
    wait_for(lambda: checkpoints_at(out), running)
    os.kill(members(out)[1], signal.SIGKILL)
    printed, log = running.communicate(timeout=300)
    assert running.returncode == 0, log
    assert json.loads(printed)["finished"]
    [restart] = json.loads(printed)["restarts"]
    assert restart["resumed_step"] % 5 == 0 and "was killed by SIGKILL" in restart["reason"]
    machine(2)
    answer = process("train", *arguments, *mesh, "--out", out)
    assert answer.code == 0, answer.err
    copy = fetched(out, tmp_path / "copy")
    assert losses(copy) == losses(tmp_path / "local")
    assert same_weights(copy, tmp_path / "local", 30)


def test_several_machines_work_in_a_folder_that_all_mount(
    arguments: list[str], tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that meet by the name of a host, and so may be on several machines."""
    out = url(tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    meet = ["--coordinator", f"{socket.gethostname()}:{free_port()}", "--num-processes", 2]
    steps = ["--set", "mesh.fsdp=2", "--set", "stages.core.tokens=10240"]
    first = [*arguments, *steps, "--out", out, *meet, "--process-id", 0]
    refused = braeburn("train", *first).error
    assert "cannot be written by processes on several machines" in refused
    assert "or set BRAEBURN_RUNS to one" in refused
    monkeypatch.setenv("BRAEBURN_RUNS", str(tmp_path / "mounted"))  # as advised
    running = [begin([*arguments, *steps], out, *meet, "--process-id", n) for n in range(2)]
    for each in running:
        _, log = each.communicate(timeout=300)
        assert each.returncode == 0, log
    assert checkpoints_at(out) == [5, 10]
    [folder] = (tmp_path / "mounted").iterdir()
    copy = fetched(out, tmp_path / "copy")
    assert losses(copy) == losses(folder)
    assert [event["processes"] for event in events(copy, "start")] == [2]
    assert Checkpoints(copy).fault(10) is None


def test_models_to_and_from(
    local: Path, proxy: Proxy, tmp_path: Path, machine: Any, arguments: list[str]
) -> None:
    """Exported, imported, evaluated, pruned and taught from, all as with local folders."""
    run = url(tmp_path)
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    filesystem.put(str(local), run.removeprefix("s3://"), recursive=True)
    text = tmp_path / "text.txt"
    text.write_text("line 7 of a text " * 200)

    def same(command: list[object], result: Callable[[str], Any]) -> None:
        here, there = tmp_path / f"{command[0]} here", url(tmp_path, f"{command[0]} there")
        for source, out in ((local, here), (run, there)):
            answer = braeburn(command[0], source, *command[1:], "--out", out)
            assert answer.code == 0, answer.err
        assert result(str(here)) == result(there)

    def files(place: str) -> dict[str, str]:
        if place.startswith("s3://"):
            place = str(fetched(place, tmp_path / "fetched" / place.rpartition("/")[2]))
        return {
            name: value
            for name, value in contents(Path(place)).items()
            if not name.startswith((".", "checkpoints/", "config.json", "events.jsonl"))
        }

    outage = threading.Thread(target=proxy.outage, args=(OUTAGE_SECONDS,))
    outage.start()
    answer = braeburn("export", run, "--out", url(tmp_path, "hf"))  # in the middle of the outage
    outage.join()
    assert answer.code == 0, answer.err
    answer = braeburn("export", local, "--out", tmp_path / "hf")
    assert answer.code == 0, answer.err
    assert contents(tmp_path / "hf") == contents(fetched(url(tmp_path, "hf"), tmp_path / "hf 2"))
    gguf = ["--format", "gguf", "--type", "q8_0", "--out"]
    assert braeburn("export", local, *gguf, tmp_path / "a.gguf").code == 0
    assert braeburn("export", run, *gguf, url(tmp_path, "a.gguf")).code == 0
    there = filesystem.cat_file(url(tmp_path, "a.gguf"))
    assert there == (tmp_path / "a.gguf").read_bytes()
    answer = braeburn("export", run, *gguf, url(tmp_path, "a.gguf"))
    assert "a.gguf' is in use" in answer.error

    evaluated = [
        json.loads(braeburn("evaluate", place, "--data", text, "--json").out)
        for place in (local, run)
    ]
    assert evaluated[0] == evaluated[1]
    same(["prune", "--ffn", 64, "--method", "magnitude"], files)
    imported = url(tmp_path, "imported")
    answer = braeburn("import", url(tmp_path, "hf"), "--out", imported)
    assert answer.code == 0, answer.err
    answer = braeburn("import", url(tmp_path, "hf"), "--out", imported)
    assert f"--out '{imported}' is in use" in answer.error
    machine(2)
    from_import = json.loads(braeburn("evaluate", imported, "--data", text, "--json").out)
    loss = evaluated[0]["results"][str(text)]["loss"]
    assert from_import["results"][str(text)]["loss"] == pytest.approx(loss, rel=1e-5)
    # As a teacher and as initial weights: the same losses as from the local ones.
    curves = []
    for name, teacher, weights in (
        ("taught here", tmp_path / "hf", local),
        ("taught from there", url(tmp_path, "hf"), run),
        ("taught by a checkpoint", f"{run}/checkpoints/{STEPS}", run),
    ):
        changes = ["--set", f"initial_weights={weights}", "--set", "stages.core.tokens=3072"]
        changes += ["--set", f"stages.core.teacher={teacher}"]
        answer = braeburn("train", *arguments, *changes, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        curves.append(losses(tmp_path / name))
    assert curves[0] == curves[1] == curves[2]


def test_mistakes(
    arguments: list[str], tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = braeburn("train", *arguments, "--out", "s3://no-such-bucket/run")
    assert "--out 's3://no-such-bucket/run' cannot be written to" in answer.error
    assert "make the bucket or folder, or name another one" in answer.error
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    assert filesystem.ls("") == ["bucket"]
    answer = braeburn("evaluate", "s3://bucket/nothing-here")
    assert "DIR='s3://bucket/nothing-here' is neither a run directory nor" in answer.error
    lacking = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    lacking |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    answer = process("train", *arguments, "--out", "s3://bucket/run", env=lacking)
    assert "--out 's3://bucket/run' cannot be reached without credentials" in answer.error
    (tmp_path / "s3fs.py").write_text("raise ImportError('Install s3fs to access S3')\n")
    lacking = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    answer = process("train", *arguments, "--out", "s3://bucket/run", env=lacking)
    assert "--out 's3://bucket/run' cannot be used" in answer.error
    assert "make extra-s3" in answer.error
