"""What a supervised process tells its supervisor: what it is doing, its last step, and when that
began.

The supervisor makes a file for each process and names it in the environment variable
BRAEBURN_HEARTBEAT. The file has its full size from the start, and both sides keep it open: neither
a full file system nor a file that is deleted while the run goes on keeps a beat from arriving.
"""

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "BRAEBURN_HEARTBEAT"
# Of the file; a beat is written into it in one piece.
SIZE = 256


@dataclass(frozen=True)
class Beat:
    """What a process was doing last.

    Attributes:
        phase: "training" between steps, otherwise what the loop calls it, as in "compiling".
        step: the last step made, None before the first of this process.
        time: when it told so, in seconds of `time.monotonic`, one clock for all processes of a
            machine.
    """

    phase: str
    step: int | None
    time: float


class Heartbeat:
    """Writes beats where a supervisor asks for them, and does nothing elsewhere."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._file: int | None = None
        if path := os.environ.get(VARIABLE):
            try:
                self._file = os.open(path, os.O_WRONLY)
            except OSError as error:
                logging.getLogger(__name__).warning("no beats reach the supervisor: %s", error)

    def phase(self, name: str) -> None:
        """Something other than steps begins, as "compiling" or "saving"."""
        self._write(name)

    def step(self, number: int) -> None:
        """The step `number` was made."""
        self._step = number
        self._write("training")

    def _write(self, phase: str) -> None:
        if self._file is None:
            return
        beat = json.dumps({"phase": phase, "step": self._step, "time": time.monotonic()})
        with suppress(OSError):  # training goes on whatever becomes of the beats
            os.pwrite(self._file, beat.ljust(SIZE).encode(), 0)


class Beats:
    """The supervisor's side of one process's heartbeat."""

    def __init__(self, path: Path):
        """Makes the file, in its full size.

        Raises:
            OSError: there is no room for it.
        """
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.pwrite(self._file, b" " * SIZE, 0)

    def read(self) -> Beat | None:
        """The last beat, or None before the first, and where one is being written."""
        try:
            return Beat(**json.loads(os.pread(self._file, SIZE, 0)))
        except (ValueError, TypeError):
            return None

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._file)
