"""What watches over a run from outside the step: requests to stop, disk space, and loss of course."""

import errno
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        # Only the main thread may ask for signals.
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if main else ():
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


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns a failure to write to a run directory, whoever met it, into a sentence.

    Raises:
        UserError: the disk is full or must not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Checkpoints are written in C++, whose errors have no number.
        number, text = getattr(error, "errno", None), str(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "Disk quota exceeded" in text:
            free = shutil.disk_usage(directory).free
            raise UserError(
                f"no space left in {str(directory)!r} ({free:,} bytes free); earlier checkpoints are whole: free some "
                f"space or lower checkpoint.keep_last, then run the same command to resume"
            ) from error
        if isinstance(error, PermissionError) or "Permission denied" in text or "Read-only file system" in text:
            raise UserError(f"{str(directory)!r} cannot be written to; choose another folder with --out") from error
        raise
