"""What is restored is what was saved, or the checkpoint is refused."""

import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from braeburn.config import Checkpoint, Run
from braeburn.errors import UserError
from braeburn.train import checkpoint
from braeburn.train import record as records
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.record import Damaged
from braeburn.train.state import TrainState, new_state
from support import contents

PARAMS = {
    "layers": {"up": jnp.arange(64 * 48, dtype=jnp.float32).reshape(64, 48) / 7},
    "norm": jnp.ones(48),
}
OPTIMIZER = optax.adamw(1e-3)


def state_at(step: int) -> TrainState:
    """A state that differs from step to step in every array."""
    params = jax.tree.map(lambda x: x + step, PARAMS)
    state = new_state(params, OPTIMIZER)
    optimizer = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state.optimizer)
    return TrainState(jnp.int32(step), params, optimizer)


def shape_of(state: TrainState) -> TrainState:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def restored(directory: Path, step: int) -> TrainState:
    return Checkpoints(directory).restore(step, shape_of(state_at(step)), OPTIMIZER.init)


def same(one: Any, other: Any) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def begin(directory: Path, identity: str = "one") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"identity": identity}))
    return directory


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny: Run) -> Path:
    """A run directory with checkpoints 3, 5 and 8."""
    directory = begin(tmp_path_factory.mktemp("checkpoints") / "run")
    checkpoints = Checkpoints(directory, Checkpoint(keep_last=3))
    for step in (3, 5, 8):
        checkpoints.save(step, state_at(step), tiny, '{"model": {}}', {"data": f"seen at {step}"})
    checkpoints.close()
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "run")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_is_restored_with_its_record(pristine: Path) -> None:
    checkpoints = Checkpoints(pristine)
    assert checkpoints.newest_sound() == (8, [])
    assert checkpoints.facts(8) == {"data": "seen at 8"}
    assert same(restored(pristine, 8), state_at(8))
    record = records.read(pristine / "checkpoints" / "8")
    assert record is not None and record.step == 8 and record.run == "one"
    assert set(record.parts) == {"params", "optimizer", "run"}
    kept = {
        path.relative_to(pristine / "checkpoints" / "8").as_posix()
        for path in files_of(pristine / "checkpoints" / "8")
    }
    assert kept - set(record.files) == {"record.json", "_CHECKPOINT_METADATA", "commit_success.txt"}
    assert all(name.split("/")[0] in record.parts for name in record.files)


def test_a_flipped_bit_is_noticed_or_changes_nothing(directory: Path) -> None:
    """100 of the 1,000 flips of `benchmarks/checkpoint_flips.py`; at least one in every file."""
    chance, folder = random.Random(0), directory / "checkpoints" / "8"
    files = [path for path in files_of(folder) if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    unnoticed = 0
    for path in [*files, *chance.choices(files, sizes, k=100 - len(files))]:
        content, times = path.read_bytes(), path.stat()
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        if Checkpoints(directory).fault(8) is None:
            unnoticed += 1
            assert same(restored(directory, 8), state_at(8)), path
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    # What is not noticed lies in the time of writing, or in white space of the record.
    assert unnoticed < 10
    assert Checkpoints(directory).newest_sound() == (8, [])


def swap_steps(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    (folder.parent / "5").rename(folder)


def swap_optimizers(folder: Path) -> None:
    shutil.rmtree(folder / "optimizer")
    shutil.copytree(folder.parent / "5" / "optimizer", folder / "optimizer")


def lose_optimizer(folder: Path) -> None:
    shutil.rmtree(folder / "optimizer")


def lose_record(folder: Path) -> None:
    (folder / "record.json").unlink()


def lose_a_file(folder: Path) -> None:
    next(iter(sorted((folder / "params").rglob("d/*")))).unlink()


def cut_a_file(folder: Path) -> None:
    os.truncate(folder / "params" / "_METADATA", 10)


def add_a_file(folder: Path) -> None:
    (folder / "params" / "ocdbt.process_0" / "d" / "more").write_text("x")


def record_folder(folder: Path) -> None:
    (folder / "record.json").unlink()
    (folder / "record.json").mkdir()


def deep_record(folder: Path) -> None:
    (folder / "record.json").write_text("[" * 100_000 + "]" * 100_000)


def long_number(folder: Path) -> None:
    (folder / "record.json").write_text('{"format": ' + "1" * 5000 + "}")


def other_types(folder: Path) -> None:
    (folder / "record.json").write_text(
        '{"format": 1, "step": 8, "run": 1, "parts": [], "facts": 2, "files": {"a": 3}}'
    )


DAMAGES = {
    swap_steps: "it is the checkpoint of step 5 under another name",
    swap_optimizers: "is missing",
    lose_optimizer: "is missing",
    lose_record: "record.json is missing",
    lose_a_file: "is missing",
    cut_a_file: "params/_METADATA has 10 bytes instead of ",
    add_a_file: "params/ocdbt.process_0/d/more is not of this checkpoint",
    record_folder: "its record.json is a folder where a file belongs",
    deep_record: "its record.json is nested more than 100 deep",
    long_number: "its record.json has a number of thousands of digits",
    other_types: "its record.json is not as it was written",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_falls_back_to_the_newest_sound_one(directory: Path, damage: Any) -> None:
    damage(directory / "checkpoints" / "8")
    step, faults = Checkpoints(directory).newest_sound()
    assert step == (3 if damage is swap_steps else 5)
    assert [fault.step for fault in faults] == [8]
    assert DAMAGES[damage] in faults[0].reason
    assert same(restored(directory, step), state_at(step))
    before = contents(directory)
    with pytest.raises(UserError) as refusal:
        restored(directory, 8)
    sound = "checkpoint 3 is sound" if damage is swap_steps else "checkpoints 3, 5 are sound"
    assert (
        f"{str(directory / 'checkpoints' / '8')!r} is damaged: {faults[0].reason}; {sound}"
        in str(refusal.value)
    )
    assert contents(directory) == before

    kept = Checkpoints(directory).set_aside(faults[0])
    assert kept.name == "8.damaged" and kept.is_dir()
    assert Checkpoints(directory).newest() == step


def test_the_checkpoint_of_another_run_is_refused(pristine: Path, tmp_path: Path) -> None:
    other = begin(tmp_path / "other", "two")
    shutil.copytree(pristine / "checkpoints", other / "checkpoints")
    step, faults = Checkpoints(other).newest_sound()
    assert step is None and "it is of another run than" in faults[0].reason


def test_one_that_is_set_aside_is_no_checkpoint_and_is_not_deleted(
    directory: Path, tiny: Run
) -> None:
    for number in (1, 2):
        lose_a_file(directory / "checkpoints" / "8")
        _, faults = Checkpoints(directory).newest_sound()
        Checkpoints(directory).set_aside(faults[0])
        checkpoints = Checkpoints(directory, Checkpoint(keep_last=1))
        assert checkpoints.save(8, state_at(8 + number), tiny, "{}")
        checkpoints.close()
        assert Checkpoints(directory).steps() == [8]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "8",
        "8.damaged",
        "8.damaged-2",
    ]


def test_a_model_or_an_optimizer_of_another_shape_is_told_from_damage(directory: Path) -> None:
    shape = shape_of(state_at(8))
    wider = shape._replace(
        params={**shape.params, "norm": jax.ShapeDtypeStruct((49,), jnp.float32)}
    )
    with pytest.raises(
        UserError, match=r"8' is of another model than the run; put the fields of model back"
    ):
        Checkpoints(directory).restore(8, wider, OPTIMIZER.init)
    other = optax.sgd(1e-3, momentum=0.9)
    with pytest.raises(
        UserError,
        match=r"8' is of another optimizer than the run; put the fields of optimizer back",
    ):
        Checkpoints(directory).restore(8, shape_of(new_state(PARAMS, other)), other.init)


def test_a_state_without_an_optimizer_is_for_step_0_only(tmp_path: Path, tiny: Run) -> None:
    directory = begin(tmp_path / "run")
    checkpoints = Checkpoints(directory, Checkpoint())
    bare = TrainState(jnp.int32(0), PARAMS, None)
    with pytest.raises(ValueError, match="the state at step 2 has no optimizer"):
        checkpoints.save(2, bare, tiny, "{}")
    checkpoints.save(0, bare, tiny, "{}")
    checkpoints.close()
    assert same(restored(directory, 0), new_state(PARAMS, OPTIMIZER))


def test_checkpoints_of_the_first_version_are_read_with_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (directory / "checkpoints").iterdir():
        lose_record(folder)
        description = json.loads((folder / "run" / "metadata").read_text())
        del description["record"]
        (folder / "run" / "metadata").write_text(json.dumps(description))
    with caplog.at_level(logging.WARNING, "braeburn"):
        assert Checkpoints(directory).newest_sound() == (8, [])
    assert "has no checksums, as checkpoints of version 0.1.0, and is read unchecked" in caplog.text
    assert same(restored(directory, 8), state_at(8))
    assert Checkpoints(directory).fault(8) is None

    lose_optimizer(directory / "checkpoints" / "8")
    step, (fault,) = Checkpoints(directory).newest_sound()
    assert (step, fault.reason) == (5, "its part 'optimizer' is missing")
    # It might be damage here, and the sentence says so; but nothing is certain, so nothing is to be
    # thrown away.
    next(iter(sorted((directory / "checkpoints" / "5" / "params").rglob("d/*")))).write_bytes(
        b"nonsense"
    )
    with pytest.raises(
        UserError, match=r"5' could not be read \(.*it has no checksums to tell damage by"
    ) as refusal:
        restored(directory, 5)
    assert "move" not in str(refusal.value)


def test_a_record_of_a_later_version_is_no_damage(directory: Path) -> None:
    path = directory / "checkpoints" / "8" / "record.json"
    content = json.loads(path.read_text()) | {"format": 2, "more": [1.5, None]}
    del content["checksum"]
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError,
        match=r"record\.json' is of format 2, and this version of Braeburn reads 1; use the",
    ):
        Checkpoints(directory).newest_sound()
    assert Checkpoints(directory).steps() == [3, 5, 8]


def test_a_failure_to_read_is_not_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, or a network file system that is away, is told as what it is: the checkpoint
    stays where it is.
    """

    def fail(error: Exception) -> Any:
        def read(*_: Any, **__: Any) -> Any:
            raise error

        return read

    checkpoints = Checkpoints(directory)
    monkeypatch.setattr(
        checkpoint, "placed", fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    )
    with pytest.raises(
        UserError,
        match=r"could not be read \(RESOURCE_EXHAUSTED: Out of memory\); its files have the right",
    ):
        checkpoints.restore_params(8, shape_of(state_at(8)).params)
    monkeypatch.setattr(
        checkpoint, "placed", fail(ValueError("INTERNAL: Input/output error [os_error_code='5']"))
    )
    with pytest.raises(
        UserError,
        match=r"the storage of '.*checkpoints' failed \(input/output error\); see to the disk",
    ):
        checkpoints.restore_params(8, shape_of(state_at(8)).params)

    def away(*_: Any) -> Any:
        raise OSError(116, "Stale file handle", str(directory / "checkpoints" / "8" / "params"))

    monkeypatch.setattr(records, "check_content", away)
    with pytest.raises(
        UserError, match=r"the storage of '.*8/params' failed \(stale file handle\)"
    ):
        checkpoints.newest_sound()


def test_folders_of_other_names_are_no_checkpoints(directory: Path, tiny: Run) -> None:
    for name in ("008", "9x", "٣", "12.damaged", "1" * 200, "-1"):
        (directory / "checkpoints" / name).mkdir()
    (directory / "checkpoints" / "11").write_text("a file")
    assert Checkpoints(directory).steps() == [3, 5, 8]
    checkpoints = Checkpoints(directory, Checkpoint(keep_last=1))
    assert checkpoints.save(10, state_at(10), tiny, "{}")
    checkpoints.close()
    assert Checkpoints(directory).steps() == [10]


def test_a_record_is_checked_without_a_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "a").write_bytes(b"abc")
    files = records.hash_files(tmp_path, ["params/a"])
    assert files == {
        "params/a": (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    }
    record = records.Record(1, None, {"params": "", "run": ""}, {}, files)
    records.write(tmp_path, record)
    assert records.read(tmp_path) == record
    records.check_names(tmp_path, record)
    (tmp_path / "params" / "a").write_bytes(b"abd")
    records.check_names(tmp_path, record)
    with pytest.raises(Damaged, match=r"params/a does not have the checksum in record\.json"):
        records.check_content(tmp_path, record, files)


def test_importing_changes_nothing_of_the_program_that_imports() -> None:
    program = """
import logging, sys, threading
before = threading.excepthook, sys.unraisablehook, logging.getLogger("asyncio").level
import braeburn.train.checkpoint
assert before == (threading.excepthook, sys.unraisablehook, logging.getLogger("asyncio").level)
assert logging.getLogger("absl").level < logging.CRITICAL
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
