"""`launch local` with real processes that train together."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from together import ENVIRON, STEPS, members

from braeburn.errors import UserError
from braeburn.launch.local import share_gpus
from support import PROGRAM, events, process, rows


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in rows(directory)]


@pytest.mark.deep
def test_four_processes_train_as_one_though_one_is_killed(
    arguments: list[str], tmp_path: Path
) -> None:
    alone = process("train", *arguments, "--out", tmp_path / "alone", "--json", env=ENVIRON)
    assert alone.code == 0, alone.err

    out = tmp_path / "together"
    command = [
        *PROGRAM,
        "launch",
        "local",
        *arguments,
        "--out",
        str(out),
        "--processes",
        "4",
        "--json",
    ]
    supervisor = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON
    )
    deadline = time.monotonic() + 120
    while (
        not (out / "metrics.jsonl").exists()
        or len((out / "metrics.jsonl").read_text().splitlines()) < 12
    ):
        assert time.monotonic() < deadline and supervisor.poll() is None
        time.sleep(0.02)
    number = random.randrange(4)
    os.kill(members(out)[number], signal.SIGKILL)
    printed, log = supervisor.communicate(timeout=200)
    assert supervisor.returncode == 0, log
    assert members(out) == {}

    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    result = json.loads(printed)
    assert result["processes"] == 4
    assert result["stages"][0]["loss"] == pytest.approx(
        json.loads(alone.out)["stages"][0]["loss"], rel=1e-5
    )

    [restart] = result["restarts"]
    assert restart["reason"].startswith(f"process {number} was killed by SIGKILL after step 1")
    assert restart["resumed_step"] in (5, 10, 15) and restart["seconds"] < 60
    [event] = events(out, "restart")
    assert (event["step"], event["reason"]) == (restart["resumed_step"], restart["reason"])
    assert events(out, "resume")[0]["step"] == restart["resumed_step"]
    assert events(out, "start")[0]["processes"] == 4
    # Logs and metrics come from one process.
    assert log.count("stage core: ") == 2 * log.count("compiled in") + 2
    assert len(list((out / "tensorboard").iterdir())) == 2


def test_a_mistake_of_all_processes_is_one_sentence(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    answer = process(
        "launch", "local", *arguments, "--out", tmp_path / "out", "--processes", 2, env=ENVIRON
    )
    assert answer.error.endswith("holds 'notes.txt' but no run; choose an empty or new folder")
    assert members(tmp_path / "out") == {}


def devices(folder: Path, gpus: int) -> Path:
    for name in [f"nvidia{index}" for index in range(gpus)] + ["nvidiactl", "nvidia-uvm"]:
        (folder / name).touch()
    return folder


def test_gpus_are_shared_evenly(tmp_path: Path) -> None:
    gpus = devices(tmp_path, 8)
    assert share_gpus(4, {}, gpus) == [
        {"JAX_LOCAL_DEVICE_IDS": ids} for ids in ("0,1", "2,3", "4,5", "6,7")
    ]
    assert share_gpus(2, {"CUDA_VISIBLE_DEVICES": "5,7"}, gpus) == [
        {"JAX_LOCAL_DEVICE_IDS": ids} for ids in "01"
    ]
    assert (
        share_gpus(3, {"JAX_PLATFORMS": "cpu"}, gpus)
        == share_gpus(3, {"CUDA_VISIBLE_DEVICES": ""}, gpus)
        == [{}] * 3
    )
    with pytest.raises(
        UserError,
        match="--processes 3 cannot share 8 GPUs evenly; use 1 or 2 or 4 or 8, or set JAX_",
    ):
        share_gpus(3, {}, gpus)
    with pytest.raises(
        UserError, match="--processes 4 cannot share 1 GPU evenly; use 1, or set JAX_PLATFORMS=cpu"
    ):
        share_gpus(4, {"CUDA_VISIBLE_DEVICES": "GPU-5a"}, gpus)
