"""A request to stop is heeded within seconds whatever a run is doing, and nothing of it is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import curve, stage_ends

from braeburn import background
from braeburn.background import Background, Feed
from braeburn.config import Run, override
from braeburn.errors import Interrupted
from braeburn.train import ahead, feed, guard, heartbeat, held_out, preparation, stage_run
from braeburn.train.directory import RunDirectory
from braeburn.train.guard import StopRequest
from braeburn.train.loop import Outcome, train
from braeburn.train.resolved import ResolvedStage
from support import deep_but, events, rows

LIMIT = 5.0
# The module that calls each piece of work.
MODULES = {
    "prepare": preparation,
    "compile_stage": ahead,
    "initial_state": ahead,
    "enter": stage_run,
}


class Stuck:
    """Work that goes on until the test is over, as a compiler would; SIGTERM comes once it has
    begun.
    """

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked: float | None = None
        self.once = threading.Event()
        self.once.set()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.once.wait()
        if self.asked is None:
            self.asked = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        self.over.wait()
        raise RuntimeError("it was let go at the end of the test")

    @property
    def seconds(self) -> float:
        """Since it was asked to stop."""
        assert self.asked is not None, "it was never reached"
        return time.monotonic() - self.asked


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    work = Stuck()
    yield work
    work.over.set()
    while background.still_running():
        time.sleep(0.01)


def interrupted(run: Run, out: Path, stuck: Stuck, **options: Any) -> Outcome:
    """How a call ends that meets the stuck work."""
    outcome = train(run, out, **options)
    assert stuck.seconds < LIMIT
    assert not outcome.finished
    return outcome


@pytest.mark.parametrize(
    "work", deep_but(["prepare", "compile_stage"], ["prepare", "compile_stage", "initial_state"])
)
def test_before_the_first_step(
    tiny: Run,
    finished: Path,
    tmp_path: Path,
    stuck: Stuck,
    monkeypatch: pytest.MonkeyPatch,
    work: str,
) -> None:
    if work != "prepare":
        # Compiling begins while text is prepared; what is meant here is the time when it alone is
        # left.
        stuck.once.clear()
        written = RunDirectory.event
        monkeypatch.setattr(
            RunDirectory, "event", lambda *a, **k: (written(*a, **k), stuck.once.set())
        )
    with monkeypatch.context() as patched:
        patched.setattr(MODULES[work], work, stuck)
        assert interrupted(tiny, tmp_path, stuck).step == 0
    assert (tmp_path / "config.json").exists() == (work != "prepare")
    if work != "prepare":
        assert [(event["step"], event["signal"]) for event in events(tmp_path, "preemption")] == [
            (0, "SIGTERM")
        ]
    # The same folder is gone on with.
    assert train(tiny, tmp_path, stop_after_steps=2).step == 2
    assert curve(tmp_path) == curve(finished)[:2]


@pytest.mark.parametrize("work", deep_but(["enter"], ["compile_stage", "enter"]))
def test_between_stages(
    tiny: Run,
    finished: Path,
    tmp_path: Path,
    stuck: Stuck,
    monkeypatch: pytest.MonkeyPatch,
    work: str,
) -> None:
    original = getattr(MODULES[work], work)

    def only_first(stage: ResolvedStage, *rest: Any) -> Any:
        return original(stage, *rest) if stage.name == "core" else stuck()

    with monkeypatch.context() as patched:
        patched.setattr(MODULES[work], work, only_first)
        assert interrupted(tiny, tmp_path, stuck).step == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6"]
    assert train(tiny, tmp_path, stop_after_steps=2).step == 8
    assert curve(tmp_path) == curve(finished)[:8]


@pytest.mark.deep
def test_while_evaluating_what_a_stage_has_left(
    tiny: Run, finished: Path, tmp_path: Path, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(held_out, "measure", stuck)
        outcome = interrupted(tiny, tmp_path, stuck, stop_after_steps=6)
        assert (outcome.step, outcome.stages) == (6, [])
    # What was left out is made up for, once, before anything else.
    assert train(tiny, tmp_path, stop_after_steps=1).step == 7
    assert stage_ends(tmp_path) == stage_ends(finished)[:1]
    assert curve(tmp_path) == curve(finished)[:7]


def test_while_evaluating_within_a_stage(
    tiny: Run, finished: Path, tmp_path: Path, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = override(tiny, {"evaluation.every_steps": 3})
    with monkeypatch.context() as patched:
        patched.setattr(held_out, "measure", stuck)
        assert interrupted(run, tmp_path, stuck).step == 3
    # The steps that no checkpoint had yet were saved.
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert events(tmp_path, "evaluation") == []
    assert train(run, tmp_path, stop_after_steps=2).step == 5
    assert curve(tmp_path) == curve(finished)[:5]
    # What was left out is made up for, once.
    assert train(run, tmp_path, stop_after_steps=0).step == 5
    assert [event["step"] for event in events(tmp_path, "evaluation")] == [3]


def test_while_a_batch_does_not_come(
    tiny: Run, finished: Path, tmp_path: Path, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_after_two(*arguments: Any) -> Iterator[Any]:
        batches = original(*arguments)
        yield next(batches)
        yield next(batches)
        stuck()

    original = feed.prefetch
    with monkeypatch.context() as patched:
        patched.setattr(feed, "prefetch", stops_after_two)
        step = interrupted(tiny, tmp_path, stuck).step
    assert 1 <= step <= 2  # batches are read ahead
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert train(tiny, tmp_path, stop_after_steps=2).step == step + 2
    assert curve(tmp_path) == curve(finished)[: step + 2]


def test_a_batch_that_does_not_come_is_told_of(
    tiny: Run,
    tmp_path: Path,
    stuck: Stuck,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def slow(*arguments: Any) -> Iterator[Any]:
        time.sleep(1.0)
        yield stuck()

    monkeypatch.setattr(feed, "prefetch", slow)
    monkeypatch.setattr(feed, "SECONDS_BETWEEN_WARNINGS", 0.3)
    interrupted(override(tiny, {"data.workers": 2}), tmp_path, stuck)
    assert "warning: the batch of step 1 has not come for " in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.deep
def test_a_batch_that_does_not_come_at_the_start_of_a_stage(
    tiny: Run, finished: Path, tmp_path: Path, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = feed.prefetch
    with monkeypatch.context() as patched:

        def only_first(batches: Any, *rest: Any) -> Iterator[Any]:
            yield from original(batches, *rest) if len(batches) == 6 else iter(stuck, None)

        patched.setattr(feed, "prefetch", only_first)
        assert interrupted(tiny, tmp_path, stuck).step == 6
    assert train(tiny, tmp_path, stop_after_steps=2).step == 8
    assert curve(tmp_path) == curve(finished)[:8]
    assert stage_ends(tmp_path) == stage_ends(finished)[:1]


def test_a_stopped_data_worker_holds_nothing_up(tiny: Run, finished: Path, tmp_path: Path) -> None:
    """Its process is stopped, not ended, so that grain would wait for ever."""
    import multiprocessing

    run = override(tiny, {"data.workers": 1, "data.prefetch": 1})

    def stop_worker() -> None:
        while not rows_there(tmp_path):
            time.sleep(0.01)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGSTOP)
        time.sleep(0.5)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    asked: list[float] = []
    thread = threading.Thread(target=stop_worker)
    thread.start()
    outcome = train(run, tmp_path)
    thread.join()
    assert time.monotonic() - asked[0] < LIMIT
    assert curve(tmp_path) == curve(finished)[: outcome.step]
    while background.still_running():
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def rows_there(directory: Path) -> bool:
    return (directory / "metrics.jsonl").exists() and bool(rows(directory))


PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from braeburn.background import ending_process
from braeburn.config import Run
from braeburn.train import ahead

def compile_stage(*_):
    os.kill(os.getpid(), signal.{signal})
    time.sleep(1000)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
ahead.compile_stage = compile_stage
from braeburn import cli
sys.argv = ["braeburn", "train", *sys.argv[1:]]
os.environ["GLIBC_TUNABLES"] = ""
cli.console()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_process_ends_though_its_compiler_goes_on(
    tiny_arguments: list[str], tmp_path: Path, name: str
) -> None:
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(signal=name),
        *tiny_arguments,
        "--out",
        str(tmp_path),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert '"step": 0' in done.stdout and '"finished": false' in done.stdout
    assert done.stderr.splitlines()[-1].startswith("stopped at step 0 of 14")


LEAVING = """
import atexit, sys, threading
from concurrent.futures import ThreadPoolExecutor
from braeburn.background import ending_process

atexit.register(print, "cleaned up")
with ending_process(lambda: None):
    {thread}
    {end}
"""
STUCK = "threading.Thread(target=threading.Event().wait).start()"
IDLE = "ThreadPoolExecutor(1).submit(print, 'worked').result()"


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(2)", 2), ("raise ValueError('why')", 1), ("pass", 0)]
)
def test_a_process_ends_though_a_thread_of_others_goes_on(end: str, code: int) -> None:
    command = [sys.executable, "-c", LEAVING.format(thread=STUCK, end=end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert ("ValueError: why" in done.stderr) == (code == 1)


@pytest.mark.parametrize(("end", "code"), [("sys.exit(2)", 2), ("pass", 0)])
def test_a_process_whose_threads_end_does_so_in_full(end: str, code: int) -> None:
    command = [sys.executable, "-c", LEAVING.format(thread=IDLE, end=end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split("\n")) == (code, ["worked", "cleaned up", ""])


def test_the_second_signal_acts_but_a_second_hangup_does_not() -> None:
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers
    }
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == "SIGHUP" and caught == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == "SIGHUP" and caught == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [signal.SIGTERM, signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:  # as under nohup
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_processes_are_told_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SECONDS_BETWEEN_QUESTIONS", 0.0)
    told: list[str] = []
    this, other = (StopRequest(told.append, lambda: told[-1] if told else None) for _ in range(2))
    for request in (this, other):
        request.check()
    this.signal = "SIGTERM"
    for _ in range(2):
        for request in (this, other):
            with pytest.raises(Interrupted, match="asked to stop by SIGTERM"):
                request.check()
    assert told == ["SIGTERM"]


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_background_work() -> None:
    assert Background(lambda: 7, "seven").result() == 7
    with pytest.raises(KeyError, match="x"):
        Background(raising(KeyError("x")), "error").result()
    over = threading.Event()
    work = Background(over.wait, "waits")
    assert background.still_running() and not work.ended(0)
    with pytest.raises(Interrupted):
        work.result(raising(Interrupted()))
    over.set()
    assert work.result() is True


def test_a_feed_gives_all_items_in_order_and_what_their_iterator_raises() -> None:
    feed = Feed(iter(range(100)), "numbers")
    assert [feed.next() for _ in range(100)] == list(range(100))
    with pytest.raises(StopIteration):
        feed.next()
    closed = []

    def fails() -> Iterator[int]:
        try:
            yield 1
            raise ValueError("broken")
        finally:
            closed.append(True)

    feed = Feed(iter(range(100)), "three", 3)
    assert [feed.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration):
        feed.next()
    feed = Feed(fails(), "fails")
    assert feed.next() == 1
    with pytest.raises(ValueError, match="broken"):
        feed.next()
    assert feed.close(5) and closed == [True]


def test_a_feed_is_closed_early() -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    feed = Feed(endless(), "endless")
    assert feed.next() == 1
    assert feed.close(5) and closed == [True]


def test_the_first_compilation_is_told_from_preparing(
    monkeypatch: pytest.MonkeyPatch, tiny: Run, tmp_path: Path
) -> None:
    """A launcher gives preparing a day, since text may be tokenised, and compiling two hours."""
    beats = tmp_path / "beats"
    beats.touch()
    monkeypatch.setenv(heartbeat.VARIABLE, str(beats))
    phases, make = [], ahead.initial_state

    def watched(*arguments: Any) -> Any:
        deadline = time.monotonic() + 10
        while not phases or (phases[-1] == "preparing" and time.monotonic() < deadline):
            phases.append(json.loads(beats.read_bytes())["phase"])
            time.sleep(0.01)
        return make(*arguments)

    monkeypatch.setattr(ahead, "initial_state", watched)
    train(tiny, tmp_path / "run", stop_after_steps=1)
    assert phases[-1] == "compiling"
