"""What a supervised process tells its supervisor: what it is doing, its last step, and when that began.

The supervisor names a file in the environment variable BRAEBURN_HEARTBEAT, one for each process.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "BRAEBURN_HEARTBEAT"


@dataclass(frozen=True)
class Beat:
    """What a process was doing last.

    Attributes:
        phase: "training" between steps, otherwise what the loop calls it, as in "compiling".
        step: the last step made, None before the first of this process.
        time: when it told so, in seconds of `time.monotonic`, one clock for all processes of a machine.
    """

    phase: str
    step: int | None
    time: float


class Heartbeat:
    """Writes beats where a supervisor asks for them, and does nothing elsewhere."""

    def __init__(self) -> None:
        self._path = os.environ.get(VARIABLE)
        self._step: int | None = None

    def phase(self, name: str) -> None:
        """Something other than steps begins, as "compiling" or "saving"."""
        self._write(name)

    def step(self, number: int) -> None:
        """The step `number` was made."""
        self._step = number
        self._write("training")

    def _write(self, phase: str) -> None:
        if self._path:
            # A reader sees the old file or the new one, never a part.
            temporary = f"{self._path}.new"
            with open(temporary, "w") as file:  # noqa: PTH123 (it is half the time of Path's)
                file.write(json.dumps({"phase": phase, "step": self._step, "time": time.monotonic()}))
            os.replace(temporary, self._path)  # noqa: PTH105


def read(path: Path) -> Beat | None:
    """The last beat in a file, or None before the first."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
