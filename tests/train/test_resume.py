import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.config import Run, override, read_run
from braeburn.errors import UserError
from braeburn.layers.spec import abstract
from braeburn.models import decoder
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.loop import Outcome, train
from support import PROGRAM, braeburn, events, rows

# Bit for bit as users have it, whose programs are optimised.
pytestmark = pytest.mark.optimized

# Both stage boundaries, the step after the first, and two within stages, of which one is tested
# less often.
OFTEN, SELDOM = random.Random(7).sample([1, 2, 3, 4, 5, 8, 9, 11, 12, 13], 2)
STOPS = [6, 7, 10, OFTEN, pytest.param(SELDOM, marks=pytest.mark.deep)]


def curve(directory: Path) -> list[tuple]:
    """What the steps computed, bit for bit; wall-clock figures aside."""
    return [
        (
            row["step"],
            row["stage"],
            row["tokens"],
            row["loss"],
            row["grad_norm"],
            row["learning_rate"],
        )
        for row in rows(directory)
    ]


def stage_ends(directory: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in event.items() if name != "time"}
        for event in events(directory, "stage_end")
    ]


def weights(directory: Path, step: int) -> dict[str, Any]:
    specs = decoder.param_specs(read_run(directory).model)
    return Checkpoints(directory).restore_params(step, abstract(specs))


def test_an_uninterrupted_run_makes_every_step_once(finished: Path, tiny: Run) -> None:
    assert [row["step"] for row in rows(finished)] == list(range(1, 15))
    assert [event["step"] for event in events(finished, "checkpoint")] == [6, 10, 14]
    assert [event["total_steps"] for event in events(finished, "start")] == [14]
    assert [(event["step"], event["finished"]) for event in events(finished, "stop")] == [
        (14, True)
    ]
    assert [event["stage"] for event in events(finished, "compile")] == list(tiny.stages)


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_leaves_no_trace_in_the_curve(
    finished: Path, tiny: Run, tmp_path: Path, stop: int
) -> None:
    first = train(tiny, tmp_path, stop_after_steps=stop)
    assert (first.step, first.finished) == (stop, False)
    assert curve(tmp_path) == curve(finished)[:stop]
    outcome = train(tiny, tmp_path)
    assert (outcome.step, outcome.finished) == (14, True)
    assert curve(tmp_path) == curve(finished)
    assert stage_ends(tmp_path) == stage_ends(finished)
    assert [event["step"] for event in events(tmp_path, "resume")] == [stop]


def test_several_stops_with_checkpoints_between_and_steps_lost(
    finished: Path, tiny: Run, tmp_path: Path
) -> None:
    run = override(
        tiny, {"checkpoint.every_steps": 2, "checkpoint.keep_last": 20, "evaluation.every_steps": 5}
    )
    reached = [train(run, tmp_path, stop_after_steps=count).step for count in (1, 2, 4)]
    assert reached == [1, 3, 7]
    # A process killed after the checkpoint of step 2: later steps are lost, and made again.
    for step in (3, 4, 6, 7):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "sta')
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "chec')
    assert train(run, tmp_path, stop_after_steps=9).step == 11
    assert train(run, tmp_path).finished
    assert curve(tmp_path) == curve(finished)
    assert stage_ends(tmp_path)[-2:] == stage_ends(finished)[-2:]
    assert [event["step"] for event in events(tmp_path, "evaluation")] == [5, 5]
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [1, 2, 4, 6, 8, 10, 11, 12, 14]
    for step in (10, 14):  # begun in the background; training went on from 10
        jax.tree.map(
            np.testing.assert_array_equal, weights(tmp_path, step), weights(finished, step)
        )


def test_which_checkpoints_are_kept(tiny: Run, tmp_path: Path) -> None:
    run = override(
        tiny,
        {"checkpoint.every_steps": 1, "checkpoint.keep_last": 2, "checkpoint.keep_every_steps": 4},
    )
    assert train(run, tmp_path, stop_after_steps=6).step == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5", "6"]


@pytest.mark.deep
def test_accumulation_resumes_too(tiny: Run, tmp_path: Path) -> None:
    run = override(tiny, {f"stages.{name}.accumulation_steps": 2 for name in tiny.stages})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(run, whole, stop_after_steps=5).step == 5
    assert train(run, parts, stop_after_steps=2).step == 2
    assert train(run, parts, stop_after_steps=3).step == 5
    assert curve(parts) == curve(whole)


def test_how_a_run_is_carried_out_may_change_and_so_may_later_stages(
    copied: Path, tiny: Run, finished: Path
) -> None:
    shutil.rmtree(copied / "checkpoints" / "14")
    changed = override(
        tiny,
        {
            "checkpoint.every_steps": 3,
            "remat.policy": "full",
            "name": "renamed",
            "data.prefetch": 1,
        },
    )
    longer = {"stages.context.tokens": 5 * 1024, "stages.context.learning_rate": 1e-4}
    with pytest.raises(
        UserError, match=r"stages\.continued\.tokens is 5120 but .* begun with 4096"
    ):
        train(override(changed, {"stages.continued.tokens": 5 * 1024}), copied)
    outcome = train(override(changed, longer), copied, stop_after_steps=1)
    assert outcome == Outcome(11, False, outcome.stages)
    assert [stage["stage"] for stage in outcome.stages] == ["core", "continued"]
    assert curve(copied)[:10] == curve(finished)[:10]
    assert curve(copied)[10][3] == pytest.approx(curve(finished)[10][3], rel=1e-5)
    assert curve(copied)[10][5] == pytest.approx(1e-4)


def begin(arguments: list[str], out: Path) -> subprocess.Popen:
    """A process that trains, once it has made its first step."""
    process = subprocess.Popen(
        [*PROGRAM, "train", *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 200
    done = metrics.stat().st_size if metrics.exists() else 0
    while not metrics.exists() or metrics.stat().st_size <= done:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    return process


def test_kill_at_a_random_moment_loses_nothing(
    finished: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*tiny_arguments, "--set", "checkpoint.every_steps=1"]
    generator = random.Random()
    for latest in (0.3, 2.0):
        process = begin(arguments, tmp_path)
        time.sleep(generator.uniform(0, latest))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
    answer = braeburn("train", *arguments, "--out", tmp_path)
    assert answer.code == 0, answer.err
    assert curve(tmp_path) == curve(finished)
    assert stage_ends(tmp_path)[-1] == stage_ends(finished)[-1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["13", "14"]
    for event in events(tmp_path, "resume"):
        assert 1 <= event["step"] <= 14


def test_a_request_to_stop_is_granted_after_the_step_in_flight(
    finished: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    process = begin(tiny_arguments, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 0, log
    (preemption,) = events(tmp_path, "preemption")
    step = preemption["step"]
    assert preemption["signal"] == "SIGTERM" and 1 <= step < 14
    assert events(tmp_path, "stop") == []
    assert curve(tmp_path) == curve(finished)[:step]
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert f"stopped at step {step} of 14" in log

    assert braeburn("train", *tiny_arguments, "--out", tmp_path).code == 0
    assert curve(tmp_path) == curve(finished)
