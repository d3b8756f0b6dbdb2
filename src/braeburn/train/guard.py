"""What watches over a run from outside the step: requests to stop, and loss of course."""

import signal
import threading
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
