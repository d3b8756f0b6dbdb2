"""What watches over a run from outside the step: requests to stop, disk space, and loss of course."""

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from braeburn.errors import UserError

MAX_SKIPPED_IN_A_ROW = 100


class StopRequest:
    """Remembers SIGTERM and SIGINT, so that the loop can save and stop after the step in flight.

    A second signal acts as usual, for those who cannot wait.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class SkipCounter:
    """Stops a run whose every step is invalid: it would go on to the end and learn nothing."""

    def __init__(self) -> None:
        self._total = 0
        self._in_a_row = 0

    def observe(self, step: int, skipped: int) -> None:
        """Takes the number of steps skipped so far.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self._in_a_row = self._in_a_row + 1 if skipped > self._total else 0
        self._total = skipped
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the last {self._in_a_row} steps up to step {step} were skipped, their gradients not finite or above "
                f"optimizer.skip_norm; lower the stage's learning_rate or raise optimizer.skip_norm and resume from "
                f"an earlier checkpoint"
            )


def check_space(directory: Path, checkpoint_bytes: int, kept: int) -> None:
    """Refuses to start a run whose checkpoints cannot fit.

    One more than is kept must fit, since the oldest goes only when the newest is whole.

    Raises:
        UserError: naming what is needed and what is free.
    """
    free = shutil.disk_usage(directory).free
    if checkpoint_bytes > free:
        raise UserError(
            f"no space left: a checkpoint takes {checkpoint_bytes:,} bytes and {str(directory)!r} has {free:,} free, "
            f"with {kept + 1} needed at times (checkpoint.keep_last={kept}); free some or choose another --out"
        )
