"""Kills and requests to stop at random moments and in each phase: `make test-kill`."""

import json
import os
import random
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from together import members

from braeburn.train import heartbeat
from support import PROGRAM, events, process, rows

KILLS, STOPS = 20, 10
LIMIT = 5.0
# As a user's process has it: one device, compiled as users' programs are.
ENVIRON = {
    key: value
    for key, value in os.environ.items()
    if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
}


def curve(directory: Path) -> list[tuple]:
    return [
        (row["step"], row["stage"], row["loss"], row["loss_average"], row["grad_norm"])
        for row in rows(directory)
    ]


def stage_ends(directory: Path) -> list[tuple]:
    return [
        (event["stage"], event["step"], event["loss"], event["held_out"])
        for event in last_ends(directory)
    ]


def last_ends(directory: Path) -> list[dict[str, Any]]:
    return list({event["stage"]: event for event in events(directory, "stage_end")}.values())


class Training:
    """A process that trains, and tells by its beats what it is doing."""

    def __init__(self, arguments: list[str], out: Path, beats: Path, **environ: str):
        self.beats = beats
        beats.write_text("")
        command = [*PROGRAM, "train", *arguments, "--out", str(out)]
        environ = {**ENVIRON, **environ, heartbeat.VARIABLE: str(beats)}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup ignores
        )

    @property
    def phase(self) -> str:
        try:
            return json.loads(self.beats.read_bytes())["phase"]
        except ValueError:  # none yet
            return "starting"

    def wait_for(self, phase: str, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while self.phase != phase:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"{phase} was never reached"
            time.sleep(0.002)

    def stop(self, number: int = signal.SIGTERM) -> tuple[float, str]:
        """Seconds from a signal to the end of the process, and what it said."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=300)
        return time.monotonic() - began, log


def test_random_kills_and_stops_leave_no_trace(tiny_arguments: list[str], tmp_path: Path) -> None:
    fields = {
        "checkpoint.every_steps": 1,
        "evaluation.every_steps": 3,
        "stages.core.tokens": 40 * 1024,
    }
    arguments = [
        *tiny_arguments,
        *(part for path, v in fields.items() for part in ("--set", f"{path}={v}")),
    ]
    whole = tmp_path / "whole"
    for out in (tmp_path / "warm", whole):  # the first compiles
        began = time.monotonic()
        undisturbed = process("train", *arguments, "--out", out, env=ENVIRON)
        seconds = time.monotonic() - began
        assert undisturbed.code == 0, undisturbed.err

    seed = random.randrange(1_000_000)
    choice = random.Random(seed)
    print(f"\nseed {seed}; undisturbed {seconds:.1f} s")
    endings = ["kill"] * KILLS + ["stop"] * STOPS
    choice.shuffle(endings)
    out, number, phases, waits = tmp_path / "run 0", 0, defaultdict(int), list[float]()
    for ending in endings:
        training = Training(arguments, out, tmp_path / "beat")
        try:
            training.process.wait(choice.uniform(0.5, seconds))
        except subprocess.TimeoutExpired:
            pass
        else:  # it was finished before; the next one begins anew
            assert training.process.returncode == 0
            compare(out, whole)
            number += 1
            out = tmp_path / f"run {number}"
            training = Training(arguments, out, tmp_path / "beat")
            time.sleep(choice.uniform(0.5, seconds / 2))
        phase = training.phase
        phases[f"{ending} while {phase}"] += 1
        if ending == "kill":
            training.process.kill()
            training.process.communicate()
            continue
        waited, log = training.stop()
        # Before there is anything to save, the signal ends the process in the usual way.
        assert training.process.returncode in (
            (0, -signal.SIGTERM) if phase == "starting" else (0,)
        ), log
        waits.append(waited)
    assert process("train", *arguments, "--out", out, env=ENVIRON).code == 0
    compare(out, whole)
    print(
        f"{KILLS} kills and {STOPS} stops over {number + 1} runs: "
        f"{json.dumps(dict(sorted(phases.items())), indent=1)}"
    )
    print(f"from SIGTERM to the end: {', '.join(f'{wait:.2f}' for wait in sorted(waits))} s")
    assert max(waits) < LIMIT


def compare(out: Path, whole: Path) -> None:
    assert curve(out) == curve(whole)
    assert stage_ends(out) == stage_ends(whole)


def text(folder: Path, megabytes: int) -> str:
    """A file of words that no other has, one document a line."""
    choice = random.Random(0)
    words = [
        "".join(choice.choices("abcdefghijklmnopqrstuvwxyz", k=choice.randint(2, 9)))
        for _ in range(20_000)
    ]
    line = " ".join(choice.choices(words, k=2000))
    path = folder / f"{megabytes}.txt"
    count = megabytes * 2**20 // len(line)
    path.write_text("\n\n".join(f"{n} {line[n % 1000 :]}" for n in range(count)))
    return str(path)


def setting(fields: dict[str, Any]) -> list[str]:
    return [
        part for path, value in fields.items() for part in ("--set", f"{path}={json.dumps(value)}")
    ]


PHASES = [
    "starting",
    "preparing",
    "compiling",
    "training",
    "evaluating",
    "stage end",
    "saving",
    "waiting",
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_request_to_stop_in_each_phase(
    tiny_arguments: list[str], tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    """From the signal to the end of the process, with work that would go on for much longer."""
    out, beats = tmp_path / "run", tmp_path / "beat"
    # Compiled anew, and of layers that are compiled one by one.
    environ = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    slow: dict[str, dict[str, Any]] = {
        "preparing": {"data.sources.code": {"paths": [text(tmp_path, 40)], "separator": "\n\n"}},
        "compiling": {"model.num_layers": 160, "model.scan_layers": False},
        "evaluating": {
            "evaluation.every_steps": 2,
            "evaluation.tokens": 10**9,
            "data.held_out": 0.5,
        },
        "stage end": {"evaluation.tokens": 10**9, "data.held_out": 0.5},
        "waiting": {"data.workers": 1, "data.prefetch": 1, "stages.core.tokens": 10**9},
        "training": {"stages.core.tokens": 10**9},
        "saving": {"checkpoint.every_steps": 1, "stages.core.tokens": 10**9},
    }
    training = Training([*tiny_arguments, *setting(slow.get(phase, {}))], out, beats, **environ)
    begin: dict[str, Callable[[], None]] = {
        "starting": lambda: time.sleep(0.5),
        "stage end": lambda: training.wait_for("evaluating"),
        "waiting": lambda: stop_worker(training),
    }
    begin.get(phase, lambda: training.wait_for(phase))()
    if phase in ("preparing", "compiling"):
        time.sleep(2.0)  # in the middle of it
    at = training.phase
    seconds, log = training.stop(number)
    print(f"\n{number.name} {phase} ({at}): {seconds:.2f} s, code {training.process.returncode}")
    assert seconds < LIMIT, log
    if phase == "starting":
        assert training.process.returncode == -number
        return
    assert training.process.returncode == 0, log
    assert "Traceback" not in log
    assert "stopped at step" in log.splitlines()[-1]


CHAIN = """
from braeburn.config import Distillation, Schedule, validate
from braeburn.recipes import load

def chain():
    run = load("afm-tiny")
    core = run.stages["core"]
    short = core.model_copy(
        update={"tokens": 3 * core.batch_tokens, "schedule": Schedule(warmup_steps=1)}
    )
    distilled = short.model_copy(
        update={"teacher": "first", "distillation": Distillation(cached=True)}
    )
    fields = {"name": "chain", "stages": {"first": short, "distilled": distilled}}
    return validate(run.model_copy(update=fields).model_dump())
"""


def test_a_request_to_stop_while_a_teacher_labels(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(CHAIN)
    source = {
        "data.sources.code": {"paths": [text(tmp_path, 20)], "separator": "\n\n"},
        "data.held_out": 0.001,
    }
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    training = Training(
        [f"{recipe}:chain", *setting(source)], tmp_path / "run", tmp_path / "beat", **environ
    )
    training.wait_for("labelling", 300)
    time.sleep(1.0)
    seconds, log = training.stop()
    print(
        f"\nSIGTERM labelling ({training.phase}): {seconds:.2f} s, code "
        f"{training.process.returncode}"
    )
    assert training.process.returncode == 0 and seconds < LIMIT, log
    assert log.splitlines()[-1] == "stopped at step 3 of 6"


@pytest.mark.parametrize("asked", ["the launcher", "one process"])
def test_several_processes_stop_together_while_they_compile(
    arguments: list[str], tmp_path: Path, asked: str
) -> None:
    out = tmp_path / "run"
    slow = setting({"model.num_layers": 160, "model.scan_layers": False})
    environ = {**ENVIRON, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
    command = [
        *PROGRAM,
        "launch",
        "local",
        *arguments,
        *slow,
        "--processes",
        "2",
        "--json",
        "--out",
        str(out),
    ]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    while not (out / "config.json").exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    time.sleep(2.0)
    began = time.monotonic()
    os.kill(launcher.pid if asked == "the launcher" else members(out)[1], signal.SIGTERM)
    printed, log = launcher.communicate(timeout=100)
    seconds = time.monotonic() - began
    print(
        f"\nSIGTERM to {asked} while two processes compile: {seconds:.2f} s, code "
        f"{launcher.returncode}"
    )
    assert launcher.returncode == 0, log
    assert json.loads(printed)["step"] == 0
    assert members(out) == {}
    # One process asks the other once a second, and the main one stays a second for the others to
    # hear of its end.
    assert seconds < LIMIT + (0 if asked == "the launcher" else 2), log


def stop_worker(training: Training) -> None:
    """Stops the process that reads batches, so that the next never comes."""
    training.wait_for("training")
    children = Path(f"/proc/{training.process.pid}/task").glob("*/children")
    for child in (int(word) for path in children for word in path.read_text().split()):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGSTOP)
    time.sleep(1.0)
