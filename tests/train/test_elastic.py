"""A run that goes on with fewer processes and on other meshes loses and repeats nothing."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import recording

from braeburn.config import Checkpoint, Run, override
from braeburn.train import feed, loop
from braeburn.train.record import check_content, check_names
from braeburn.train.record import read as read_record
from support import braeburn, events, rows

RECORDING = Path(__file__).with_name("recording.py")


def free_port() -> int:
    """A port below those that the system gives to connections, which might take it before process 0
    does.
    """
    for port in random.Random(os.getpid()).sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


def run_processes(number: int, out: Path, records: Path, *arguments: str) -> None:
    """Trains in `number` processes of one device each; each appends what it reads to a file of its
    own.
    """
    port = free_port()
    children = []
    for index in range(number):
        environ = os.environ | {
            "JAX_NUM_CPU_DEVICES": "1",
            "BRAEBURN_TEST_RECORD": f"{records}.{index}",
        }
        place = [
            "--coordinator",
            f"127.0.0.1:{port}",
            "--num-processes",
            str(number),
            "--process-id",
            str(index),
        ]
        command = [sys.executable, str(RECORDING), "train", *arguments, "--out", str(out)]
        children.append(
            subprocess.Popen(
                command + (place if number > 1 else []),
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    for child in children:
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output.decode()


def recorded(records: Path, number: int) -> list[list[dict[str, str]]]:
    """What each process read at each step: hashes of sequences by their row in the batch."""
    lines = [Path(f"{records}.{index}").read_text().splitlines() for index in range(number)]
    return [[json.loads(line)["rows"] for line in step] for step in zip(*lines, strict=True)]


@pytest.mark.deep
def test_four_processes_then_two_then_one(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, records = tmp_path / "out", tmp_path / "record"
    # One stage of 12 steps: every program more is compiled in every process.
    stage = tiny.stages["core"].model_copy(update={"tokens": 12 * 1024})
    run = tiny.model_copy(
        update={"stages": {"core": stage}, "checkpoint": Checkpoint(every_steps=2)}
    )
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from braeburn.config import validate\n\ndef run():\n    return "
        f"validate({run.model_dump()!r})\n"
    )

    def go(number: int, mesh: dict[str, int], *arguments: str) -> list[list[dict[str, str]]]:
        sets = [part for axis, size in mesh.items() for part in ("--set", f"mesh.{axis}={size}")]
        own = records.with_name(f"record-{number}")
        run_processes(number, out, own, f"{recipe}:run", *sets, *arguments)
        return recorded(own, number)

    first = go(4, {"fsdp": 4}, "--stop-after-steps", "4")
    # Each process reads a quarter of each batch and no more.
    assert [[sorted(map(int, rows)) for rows in step] for step in first] == [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    ] * 4
    # Each process hashed what it wrote; the record tells of all of it, and nothing else is left.
    saved = out / "checkpoints" / "4"
    record = read_record(saved)
    assert record is not None
    assert {f"params/ocdbt.process_{index}/manifest.ocdbt" for index in range(4)} <= set(
        record.files
    )
    assert sorted(path.name for path in saved.glob("record*")) == ["record.json"]
    check_names(saved, record)
    check_content(saved, record, record.files)
    # A bit of what process 3 wrote: of two processes one finds it, both go on from the checkpoint
    # before.
    path = max(
        (saved / "params" / "ocdbt.process_3").rglob("d/*"), key=lambda path: path.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    second = go(2, {"fsdp": 1, "tensor": 2}, "--stop-after-steps", "6")
    (damage,) = events(out, "damage")
    assert (damage["step"], damage["resumed"], damage["kept"]) == (4, 2, "4.damaged")
    assert str(path.relative_to(saved)) in damage["reason"]
    # Tensor shards work on the same sequences.
    assert all(one == other for one, other in second)
    third = go(1, {"fsdp": 1})
    seen = [
        {row: name for rows in step for row, name in rows.items()}
        for step in first[:2] + second + third
    ]

    # The undisturbed run, on one device of this process.
    undisturbed = tmp_path / "undisturbed"
    monkeypatch.setenv("BRAEBURN_TEST_RECORD", str(tmp_path / "record-undisturbed.0"))
    monkeypatch.setattr(feed, "prefetch", recording.prefetch)
    loop.train(run, undisturbed)
    assert seen == [step[0] for step in recorded(tmp_path / "record-undisturbed", 1)]

    curves = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, undisturbed)
    ]
    assert [row["step"] for row in curves[0]] == list(range(1, 13))
    difference = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(*curves, strict=True))
    assert difference < 1e-5


@pytest.mark.deep
def test_a_pipeline_goes_on_from_any_mesh_and_hands_on_to_any(tiny: Run, tmp_path: Path) -> None:
    """From a pipeline to one that is interleaved and from there to no pipeline, with the curve and
    the held-out losses of one device.
    """
    deep = {"model.num_layers": 4, "stages.core.accumulation_steps": 4}
    one = override(tiny, deep)
    loop.train(one, tmp_path / "one")
    out = tmp_path / "pipelines"
    context = {"stages.context.mesh.context": 2, "stages.context.mesh.pipeline": 2}
    context |= {"stages.context.mesh.fsdp": 1}
    first = {"mesh.pipeline": 4, "mesh.fsdp": 2}
    loop.train(override(one, first | context), out, stop_after_steps=3)
    second = {
        "mesh.pipeline": 2,
        "mesh.tensor": 2,
        "mesh.stages_per_device": 2,
        "stages.continued.mesh.tensor": 4,
        "stages.continued.mesh.fsdp": 2,
    }
    assert loop.train(override(one, second | context), out).finished
    pairs = list(zip(rows(out), rows(tmp_path / "one"), strict=True))
    assert len(pairs) == 14
    assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs) < 1e-5
    ends = [events(folder, "stage_end") for folder in (out, tmp_path / "one")]
    for end, expected in zip(*ends, strict=True):
        for source, values in end["held_out"].items():
            assert values["loss"] == pytest.approx(expected["held_out"][source]["loss"], rel=1e-5)
    on_mesh = braeburn(
        "evaluate", out, "--data", __file__, "--mesh", "pipeline=4,tensor=2", "--json"
    )
    alone = braeburn("evaluate", out, "--data", __file__, "--json")
    assert on_mesh.code == alone.code == 0, on_mesh.err
    loss, expected_loss = (
        next(iter(json.loads(answer.out)["results"].values()))["loss"]
        for answer in (on_mesh, alone)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    written = [
        braeburn(
            "generate", out, "--prompt", "def ", "--temperature", 0, "--max-new-tokens", 8, *on
        )
        for on in ((), ("--mesh", "pipeline=2,fsdp=2"))
    ]
    assert written[0].code == 0 and written[0].out == written[1].out


@pytest.mark.deep
def test_meshes_may_differ_between_stages_and_calls(
    tiny: Run, finished: Path, tmp_path: Path
) -> None:
    """On eight devices: fully sharded, then offloaded and tensor-parallel, then split along long
    sequences.
    """
    context = {"stages.context.mesh.context": 4, "stages.context.mesh.fsdp": 2}
    loop.train(override(tiny, {"mesh.fsdp": 8, **context}), tmp_path, stop_after_steps=3)
    tensor = {
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
        "offload.optimizer": True,
        "stages.core.accumulation_steps": 2,
    }
    outcome = loop.train(override(tiny, {**tensor, **context}), tmp_path)
    assert outcome.finished
    pairs = list(zip(rows(tmp_path), rows(finished), strict=True))
    assert [(a["step"], a["stage"]) for a, _ in pairs] == [
        (b["step"], b["stage"]) for _, b in pairs
    ]
    assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs) < 1e-5
    (resumed,) = events(tmp_path, "resume")
    assert resumed["step"] == 3 and resumed["mesh"]["tensor"] == 2
    held_out = [
        [end["held_out"] for end in events(folder, "stage_end")] for folder in (tmp_path, finished)
    ]
    for ours, theirs in zip(*held_out, strict=True):
        for source, values in ours.items():
            assert values["loss"] == pytest.approx(theirs[source]["loss"], rel=1e-5)
            assert values["tokens"] == theirs[source]["tokens"]
