"""The supervisor, over small processes that only pretend to train."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from braeburn.disk import scratch
from braeburn.errors import UserError
from braeburn.launch import supervisor
from braeburn.launch.supervisor import Ending, GaveUp, Patience, Supervisor, Watch
from braeburn.train.heartbeat import Beat, Beats, Heartbeat

# Steps of 10 ms in time with each other, up to a last one; process 0 saves each. Faults by attempt
# and process.
WORKER = """
import json, os, pathlib, signal, subprocess, sys, time
from braeburn.train.heartbeat import Heartbeat
folder, attempt = pathlib.Path(sys.argv[1]), sys.argv[2]
index, processes, last = map(int, sys.argv[3:])
def write(name, text):
    (folder / f"{name}.{index}.new").write_text(str(text))
    (folder / f"{name}.{index}.new").replace(folder / name)
def number(name, missing=0):
    return int((folder / name).read_text()) if (folder / name).exists() else missing
write(f"pid.{attempt}.{index}", os.getpid())
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
heartbeat = Heartbeat()
heartbeat.phase("preparing")
step = number("saved")
write(f"at.{attempt}.{index}", step)
faults = json.loads((folder / "faults").read_text())
at, what = faults.get(attempt, {}).get(str(index), [None, None])
print("log of", index, file=sys.stderr, flush=True)
while step < last and not stopped:
    while min(number(f"at.{attempt}.{i}", -1) for i in range(processes)) < step:
        time.sleep(0.005)
        if stopped: break
    else:
        if index == 0: write("saved", step)
    step += 1
    if step == at:
        if what == "crash": raise RuntimeError("a bug")
        if what == "mistake": print("error: seed=x is not valid", file=sys.stderr); sys.exit(2)
        if what == "hang": time.sleep(1000)
        if what == "grandchild":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
    time.sleep(0.01)
    heartbeat.step(step)
    write(f"at.{attempt}.{index}", step)
if index == 0: print(json.dumps({"step": step}))
"""


class Fake:
    """A run of processes that pretend, and what was told about it."""

    def __init__(self, folder: Path, last: int = 30):
        self.folder, self.last, self.attempts = folder, last, 0
        self.said: list[str] = []
        (folder / "worker.py").write_text(WORKER)
        self.faults({})

    def faults(self, faults: dict[int, dict[int, list[Any]]]) -> None:
        (self.folder / "faults").write_text(json.dumps(faults))

    def commands(self, processes: int) -> list[tuple[list[str], dict[str, str]]]:
        self.attempts += 1
        worker = [
            sys.executable,
            str(self.folder / "worker.py"),
            str(self.folder),
            str(self.attempts),
        ]
        return [
            ([*worker, str(index), str(processes), str(self.last)], {})
            for index in range(processes)
        ]

    def saved(self) -> int | None:
        path = self.folder / "saved"
        return int(path.read_text()) if path.exists() else None

    def run(
        self, processes: int = 3, max_restarts: int = 3, patience: Patience | None = None
    ) -> Ending:
        supervisor = Supervisor(
            lambda: self.commands(processes),
            max_restarts,
            self.said.append,
            self.saved,
            lambda restart: None,
            patience or Patience(floor=1.0, factor=20.0, first=1.0),
        )
        try:
            return supervisor.run()
        finally:
            self.assert_no_orphan()

    def pids(self) -> list[int]:
        return [
            int(path.read_text()) for path in self.folder.glob("pid.*") if path.suffix != ".new"
        ]

    def assert_no_orphan(self) -> None:
        assert [pid for pid in self.pids() if alive(pid)] == []


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_an_undisturbed_run_ends_with_what_process_0_prints(
    fake: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    ending = fake.run()
    assert (json.loads(ending.output), ending.restarts, fake.said) == ({"step": 30}, [], [])
    assert sorted(capfd.readouterr().err.splitlines()) == [
        "[process 1] log of 1",
        "[process 2] log of 2",
        "log of 0",
    ]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("kill", "process 1 was killed by SIGKILL after step 11"),
        ("crash", "process 1 ended with code 1 after step 11"),
    ],
)
def test_a_death_restarts_all_from_the_last_checkpoint(fake: Fake, what: str, reason: str) -> None:
    fake.faults({1: {1: [12, what]}})
    ending = fake.run()
    assert json.loads(ending.output) == {"step": 30}
    [restart] = ending.restarts
    assert restart.reason == reason
    assert restart.resumed_step == 11 and restart.seconds < 20
    assert fake.said == [
        f"{reason}; restarting all processes from step {restart.resumed_step}",
        f"restart 1 of at most 3: the first step was made after {restart.seconds} s, from step "
        f"{restart.resumed_step}",
    ]


@pytest.mark.parametrize("what", ["hang", "stop"])
def test_a_process_that_hangs_is_killed(fake: Fake, what: str) -> None:
    fake.faults({1: {2: [5, what]}})
    ending = fake.run()
    [restart] = ending.restarts
    assert restart.reason.startswith(
        "process 2 hangs: it made no step after step 4 for 1 s (limit 1 s"
    )
    assert json.loads(ending.output) == {"step": 30}


def test_what_a_process_has_started_ends_with_it(fake: Fake) -> None:
    fake.faults({1: {0: [5, "grandchild"]}})
    before = sleepers()
    fake.run(processes=1)
    wait_until(lambda: sleepers() <= before, 5)


def sleepers() -> int:
    listing = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return sum(b"time.sleep(1000)" in line and b"-c" in line for line in listing)


def test_restarts_are_limited(fake: Fake) -> None:
    fake.faults({attempt: {0: [5 * attempt, "kill"]} for attempt in range(1, 9)})
    with pytest.raises(
        GaveUp, match="killed by SIGKILL after step 14, and --max-restarts 2 are used up"
    ):
        fake.run(processes=1, max_restarts=2)
    assert fake.attempts == 3


def test_a_crash_loop_ends_early(fake: Fake) -> None:
    fake.faults({attempt: {1: [9, "crash"]} for attempt in range(1, 9)})
    message = r"process 1 ended with code 1.*, 3 times in a row without getting past step \d$"
    with pytest.raises(GaveUp, match=message):
        fake.run(processes=2, max_restarts=100)
    assert fake.attempts == 3


def test_a_mistake_of_the_users_is_passed_on_once(
    fake: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.faults({1: {0: [3, "mistake"], 1: [3, "mistake"]}})
    with pytest.raises(UserError, match=r"^seed=x is not valid$"):
        fake.run()
    assert fake.attempts == 1
    assert "error" not in capfd.readouterr().err


class TestSignals:
    """The supervisor as a process of its own."""

    @pytest.fixture
    def running(self, fake: Fake) -> Iterator[tuple[Fake, subprocess.Popen]]:
        program = (
            f"import sys; from pathlib import Path; sys.path[:0] = {[str(Path(__file__).parent)]}\n"
            f"from test_supervisor import *\n"
            f"print(Fake(Path({str(fake.folder)!r}), last=100_000).run().output, end='')"
        )
        supervisor = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        wait_until(lambda: (fake.saved() or 0) > 3)
        try:
            yield fake, supervisor
        finally:
            supervisor.kill()
            supervisor.communicate()

    def test_a_stop_is_passed_on(self, running: tuple[Fake, subprocess.Popen]) -> None:
        fake, supervisor = running
        supervisor.send_signal(signal.SIGTERM)
        out, _ = supervisor.communicate(timeout=20)
        assert supervisor.returncode == 0
        assert json.loads(out)["step"] > 3
        fake.assert_no_orphan()

    def test_kill_leaves_no_orphan(self, running: tuple[Fake, subprocess.Popen]) -> None:
        fake, supervisor = running
        assert len(fake.pids()) == 3 and all(map(alive, fake.pids()))
        supervisor.kill()
        supervisor.wait()
        wait_until(lambda: not any(map(alive, fake.pids())), 5)


def test_patience_adapts_to_the_step_time() -> None:
    phases = {"starting": 5.0, "compiling": 100.0}
    watch = Watch(Patience(floor=2.0, factor=10.0, first=20.0, phases=phases, otherwise=50.0), 0.0)
    assert watch.hung(4.9) is None
    assert watch.hung(5.1) == "was starting for 5 s (limit 5 s)"
    watch.observe(Beat("compiling", None, 6.0))
    assert watch.hung(105.9) is None and watch.hung(106.1)
    watch.observe(Beat("training", 1, 100.0))
    assert watch.hung(119.9) is None
    assert watch.hung(120.1) == "made no step after step 1 for 20 s (limit 20 s)"
    watch.observe(Beat("training", 2, 101.0))
    assert watch.hung(110.9) is None
    assert (
        watch.hung(111.1) == "made no step after step 2 for 10 s (limit 10 s, a step took 1.00 s)"
    )
    # Beats between two looks count as one, and other phases not at all.
    watch.observe(Beat("training", 6, 107.0))
    watch.observe(Beat("saving", 6, 107.1))
    assert watch.hung(157.0) is None and watch.hung(157.2)
    watch.observe(Beat("training", 7, 150.0))
    assert watch.hung(164.9) is None and watch.hung(165.1)
    watch.observe(Beat("training", 8, 150.1))
    assert watch.hung(165.0) is None and watch.hung(165.2)
    # The steps of another stage may be longer.
    watch.observe(Beat("compiling", 8, 151.0))
    watch.observe(Beat("training", 9, 160.0))
    assert watch.hung(179.9) is None and watch.hung(180.1)


def test_a_heartbeat_is_whole_and_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) / f"beat-{os.getpid()}"
    beats = Beats(path)
    assert beats.read() is None
    monkeypatch.setenv("BRAEBURN_HEARTBEAT", str(path))
    heartbeat = Heartbeat()
    path.unlink()  # as by a cleaner of temporary files: both sides have it open
    try:
        heartbeat.phase("compiling")
        beat = beats.read()
        assert (
            beat
            and (beat.phase, beat.step) == ("compiling", None)
            and 0 <= time.monotonic() - beat.time < 1
        )
        began = time.process_time()
        for step in range(500):
            heartbeat.step(step)
        assert (time.process_time() - began) / 500 < 2e-4
        heartbeat.phase("saving")
        beat = beats.read()
        assert beat and (beat.phase, beat.step) == ("saving", 499)
    finally:
        beats.close()


def test_without_a_supervisor_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRAEBURN_HEARTBEAT", raising=False)
    monkeypatch.chdir(tmp_path)
    Heartbeat().step(1)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_hang_the_stopped_one_is_named(fake: Fake) -> None:
    """Both are silent after the same step, and which of them said so last is chance."""
    for number in range(2):
        fake.faults({1: {0: [5, "stop"]}})
        for name in ("saved", "at.1.0", "at.1.1"):
            (fake.folder / name).unlink(missing_ok=True)
        fake.attempts = 0
        ending = fake.run(processes=2)
        assert ending.restarts[0].reason.startswith("process 0 hangs: it "), number


def test_what_killed_launchers_left_is_removed_and_nothing_else(fake: Fake, tmp_path: Path) -> None:
    shared = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    others = shared / ".braeburn-beats.partial-of-someone"
    others.mkdir(exist_ok=True)
    program = (
        "import os\nfrom pathlib import Path\nfrom braeburn.disk import scratch\n"
        f"with scratch(Path({str(shared)!r}), 'braeburn-beats') as folder:\n"
        "    print(folder, flush=True)\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    abandoned = Path(done.stdout.strip())
    assert abandoned.is_dir()
    try:
        with scratch(shared, "braeburn-beats") as running:
            fake.run(processes=1)
            assert not abandoned.exists() and running.is_dir() and others.is_dir()
        assert not running.exists()
    finally:
        others.rmdir()


def test_a_full_memory_file_system_does_not_end_a_run(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room in memory at the start, beats go to the disk."""
    whole = supervisor.heartbeat.Beats

    def full(path: Path) -> Beats:
        if path.is_relative_to("/dev/shm"):
            raise OSError(28, "No space left on device", str(path))
        return whole(path)

    monkeypatch.setattr(supervisor.heartbeat, "Beats", full)
    assert json.loads(fake.run(processes=2).output) == {"step": 30}
