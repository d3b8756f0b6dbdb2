"""Watches over processes that work together: when one dies or hangs all are ended and started anew.

Nothing here knows what they compute. They tell by `train.heartbeat` what they are doing.
"""

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from braeburn.disk import scratch
from braeburn.errors import UserError
from braeburn.train import heartbeat
from braeburn.train.guard import StopRequest

POLL_SECONDS = 0.1
# A process that fails by itself so often without a step more than before will fail again.
FAILURES_IN_PLACE = 3
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Patience:
    """How long a process may be silent, in seconds, before it counts as hung.

    Attributes:
        floor: between steps at least.
        factor: between steps, as a multiple of the longest recent step.
        first: between steps of which none was timed yet, since the stage began.
        phases: in anything else, by the name of the phase; "starting" lasts until its first beat.
        otherwise: in phases not named.
    """

    floor: float = 60.0
    factor: float = 10.0
    first: float = 600.0
    phases: Mapping[str, float] = field(
        default_factory=lambda: {
            "starting": 600.0,
            "preparing": 86_400.0,
            "copying": 86_400.0,
            "compiling": 7_200.0,
        }
    )
    otherwise: float = 3_600.0


class Watch:
    """Judges from its beats whether one process hangs."""

    def __init__(self, patience: Patience, now: float):
        self._patience = patience
        self._beat = heartbeat.Beat("starting", None, now)
        self._gaps: deque[float] = deque(maxlen=50)

    @property
    def step(self) -> int | None:
        """The last step that the process made, None before the first."""
        return self._beat.step

    @property
    def since(self) -> float:
        """When it last gave a sign."""
        return self._beat.time

    @property
    def order(self) -> tuple[int, bool]:
        """How far it is: a step is made, then what comes before the next, as saving."""
        return (-1 if self.step is None else self.step), self._beat.phase != "training"

    def observe(self, beat: heartbeat.Beat | None) -> None:
        """Takes a beat, the same as before or a new one."""
        if beat is None or beat == self._beat:
            return
        before = self._beat
        if before.phase == beat.phase == "training" and beat.step != before.step:
            self._gaps.append(
                (beat.time - before.time) / max(1, (beat.step or 0) - (before.step or 0))
            )
        if beat.phase == "compiling":
            self._gaps.clear()  # another stage, whose steps may be longer
        self._beat = beat

    def hung(self, now: float) -> str | None:
        """What to say of a process that has been silent too long, None of one that has not."""
        silence, phase = now - self._beat.time, self._beat.phase
        if phase == "training":
            longest = max(self._gaps, default=None)
            limit = (
                max(self._patience.floor, self._patience.factor * longest)
                if longest
                else self._patience.first
            )
            usual = f", a step took {statistics.median(self._gaps):.2f} s" if self._gaps else ""
            doing = (
                f"made no step after step {self.step} for {silence:.0f} s (limit {limit:.0f} "
                f"s{usual})"
            )
        else:
            limit = self._patience.phases.get(phase, self._patience.otherwise)
            doing = f"was {phase} for {silence:.0f} s (limit {limit:.0f} s)"
        return doing if silence > limit else None


@dataclass(frozen=True)
class Restart:
    """One restart.

    Attributes:
        reason: what failed.
        resumed_step: that of the checkpoint to go on from, None for the beginning.
        seconds: from the failure to the first step made, None where the next failure came before.
    """

    reason: str
    resumed_step: int | None
    seconds: float | None

    @property
    def origin(self) -> str:
        """Where it goes on from, in words."""
        return (
            "from the beginning" if self.resumed_step is None else f"from step {self.resumed_step}"
        )


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended: a clause about it, the process's exit code (None where it hung), and
    its error message.
    """

    reason: str
    code: int | None
    message: str | None = None


class GaveUp(Exception):
    """The processes failed more often than they may; the message says how."""


class _Child:
    """One process with its group, its output and its beats."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        beats: heartbeat.Beats,
        watch: Watch,
    ):
        self.index, self.watch = index, watch
        self.errors: list[str] = []
        self.output: list[str] = []
        self._beats = beats
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environ, heartbeat.VARIABLE: str(beats.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        streams = (self._process.stdout, self._process.stderr)
        self._pumps = [
            threading.Thread(target=self._pump, args=(stream,), daemon=True) for stream in streams
        ]
        for pump in self._pumps:
            pump.start()

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def observe(self) -> None:
        """Reads its last beat."""
        self.watch.observe(self._beats.read())

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped it, where the system tells."""
        try:
            state = (
                Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            )
        except (OSError, IndexError):
            return False
        return state in "Tt"

    def send(self, number: int) -> None:
        """Sends a signal to the process itself."""
        if self.code is None:
            self._process.send_signal(number)

    def end(self) -> None:
        """Kills whatever is left of it and of what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pump in self._pumps:
            pump.join(timeout=5)

    def _pump(self, stream: IO[str]) -> None:
        label = f"[process {self.index}] "
        for line in stream:
            if stream is self._process.stdout and self.index == 0:
                self.output.append(line)
            elif line.startswith(("error: ", f"{label}error: ")):
                self.errors.append(line.removeprefix(label).removeprefix("error: ").strip())
            else:
                # One call for each line, so that those of several processes do not mix. A terminal
                # that is gone or a log on a full disk must not end the reading: the process would
                # wait for it.
                with suppress(OSError):
                    sys.stderr.write(
                        line if self.index == 0 or line.startswith(label) else label + line
                    )
                    sys.stderr.flush()


@contextmanager
def _beats(number: int) -> Iterator[list[heartbeat.Beats]]:
    """A file for the beats of each process: in memory, so that they do not wait for a disk, where
    there is room.

    Raises:
        UserError: there is no room anywhere.
    """
    folders = [Path("/dev/shm")] if os.access("/dev/shm", os.W_OK) else []
    folders.append(Path(tempfile.gettempdir()))
    for parent in folders:
        with suppress(OSError), ExitStack() as held:
            folder = held.enter_context(scratch(parent, "braeburn-beats"))
            files = [heartbeat.Beats(folder / f"{index}") for index in range(number)]
            kept = held.pop_all()
            break
    else:
        raise UserError(
            f"no space left for the heartbeats of processes in {' or '.join(map(str, folders))}; "
            f"free some"
        )
    with kept:
        for file in files:
            kept.callback(file.close)
        yield files


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process does first, so that it does not outlive this one even where this one is
    killed.
    """
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask_the_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask_the_kernel


@dataclass(frozen=True)
class Ending:
    """How a supervised run ended: what process 0 wrote to standard output, and the restarts that it
    took.
    """

    output: str
    restarts: list[Restart]


@dataclass
class Supervisor:
    """Runs processes to their end, all anew from their last checkpoint when one dies or hangs.

    Attributes:
        commands: the command of each process, and what its environment has besides this one's, for
            each attempt anew.
        max_restarts: how often at most.
        say: takes lines for the user.
        newest_checkpoint: the step that the next attempt will go on from, None for the beginning.
        restarting: is told of each restart before it begins.
        patience: when a process counts as hung.
    """

    commands: Callable[[], Sequence[tuple[Sequence[str], Mapping[str, str]]]]
    max_restarts: int
    say: Callable[[str], None]
    newest_checkpoint: Callable[[], int | None]
    restarting: Callable[[Restart], None]
    patience: Patience = Patience()

    def run(self) -> Ending:
        """Returns once every process has ended well. SIGTERM, SIGINT and SIGHUP are passed on: they
        save and stop.

        Raises:
            UserError: a process ended with code 2, which is a mistake of the user's; its message.
            GaveUp: restarts were used up, or three failures in a row brought no step more.
            SystemExit: a signal ended processes that could not stop by themselves yet.
        """
        restarts: list[Restart] = []
        furthest, in_place, began = -1, 0, time.monotonic()
        with StopRequest() as stop:
            while True:
                attempt = _Attempt(self, stop, restarts, began)
                failure = attempt.run()
                began = time.monotonic()
                if failure is None:
                    return Ending("".join(attempt.children[0].output), restarts)
                if stop.signal:
                    sys.exit(128 + signal.Signals[stop.signal])
                if failure.code == 2:
                    raise UserError(failure.message or failure.reason)
                # Whoever was killed from outside may well get further next time.
                if failure.code not in (None, -signal.SIGKILL, -signal.SIGTERM):
                    in_place = 1 if attempt.furthest > furthest else in_place + 1
                furthest = max(furthest, attempt.furthest)
                if in_place == FAILURES_IN_PLACE:
                    where = f"step {furthest}" if furthest >= 0 else "the first step"
                    raise GaveUp(
                        f"{failure.reason}, {in_place} times in a row without getting past {where}"
                    )
                if len(restarts) == self.max_restarts:
                    raise GaveUp(
                        f"{failure.reason}, and --max-restarts {self.max_restarts} are used up"
                    )
                restarts.append(Restart(failure.reason, self.newest_checkpoint(), None))
                self.say(f"{failure.reason}; restarting all processes {restarts[-1].origin}")
                self.restarting(restarts[-1])


class _Attempt:
    """One life of all processes, from their start to the end of the last."""

    def __init__(
        self, supervisor: Supervisor, stop: StopRequest, restarts: list[Restart], began: float
    ):
        self.children: list[_Child] = []
        self._supervisor, self._stop, self._restarts, self._began = (
            supervisor,
            stop,
            restarts,
            began,
        )

    @property
    def furthest(self) -> int:
        """The last step that any process made in this life, -1 without any."""
        return max(
            (child.watch.step for child in self.children if child.watch.step is not None),
            default=-1,
        )

    def run(self) -> Failure | None:
        """Returns what failed first, or None once all have ended well.

        None of the processes is left.
        """
        commands = self._supervisor.commands()
        with _beats(len(commands)) as beats:
            try:
                for index, (command, environ) in enumerate(commands):
                    watch = Watch(self._supervisor.patience, time.monotonic())
                    self.children.append(_Child(index, command, environ, beats[index], watch))
                return self._watch()
            finally:
                for child in self.children:
                    child.end()

    def _watch(self) -> Failure | None:
        passed_on = False
        while True:
            if self._stop.signal and not passed_on:
                passed_on = True
                for child in self.children:
                    child.send(signal.Signals[self._stop.signal])
            for child in self.children:
                child.observe()
            if failure := self._dead() or self._hung():
                return failure
            if self._restarts and self._restarts[-1].seconds is None and self.furthest >= 0:
                self._tell_restarted()
            if all(child.code == 0 for child in self.children):
                return None
            time.sleep(POLL_SECONDS)

    def _dead(self) -> Failure | None:
        if all(child.code in (None, 0) for child in self.children):
            return None
        time.sleep(POLL_SECONDS)  # a death brings others within moments; all of them are looked at
        dead = [child for child in self.children if child.code not in (None, 0)]
        first = min(dead, key=lambda child: _rank(child.code or 0))
        code = first.code or 0
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        made = f" after step {first.watch.step}" if first.watch.step is not None else ""
        for child in self.children:
            child.end()
        for child in self.children:
            for message in child.errors if code != 2 else ():
                self._supervisor.say(f"[process {child.index}] error: {message}")
        return Failure(f"process {first.index} {how}{made}", code, next(iter(first.errors), None))

    def _hung(self) -> Failure | None:
        now = time.monotonic()
        hung = [child for child in self.children if child.code is None and child.watch.hung(now)]
        if not hung:
            return None
        stopped = [child for child in self.children if child.code is None and child.stopped]
        if stopped:
            first = min(stopped, key=lambda child: child.watch.since)
            doing = (
                first.watch.hung(now) or f"was stopped by a signal after step {first.watch.step}"
            )
            return Failure(f"process {first.index} hangs: it {doing}", None)
        # The one that hangs is behind those that wait for it. At the same step it cannot be told
        # from them: which of them was the last to say so is chance.
        furthest_behind = min(child.watch.order for child in hung)
        suspects = [child for child in hung if child.watch.order == furthest_behind]
        first = min(suspects, key=lambda child: child.watch.since)
        others = [str(child.index) for child in suspects if child is not first]
        waiting = (
            f" (so it seems; process{'es' * (len(others) > 1)} {', '.join(others)} fell "
            f"silent with it)"
        )
        return Failure(
            f"process {first.index} hangs: it {first.watch.hung(now)}{waiting if others else ''}",
            None,
        )

    def _tell_restarted(self) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        restart = self._restarts[-1] = replace(self._restarts[-1], seconds=seconds)
        self._supervisor.say(
            f"restart {len(self._restarts)} of at most {self._supervisor.max_restarts}: the first "
            f"step was made after {seconds} s, {restart.origin}"
        )


def _rank(code: int) -> int:
    """Which of several deaths to take for the cause: a kill, then a mistake, then what may follow
    from others'.
    """
    if code < 0 and code != -signal.SIGABRT:  # JAX aborts where another process is gone
        return 0
    return 1 if code == 2 else 2
