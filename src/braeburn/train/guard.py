"""What watches over a run from outside the step: requests to stop, and loss of course."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from braeburn.config import Run
from braeburn.errors import Interrupted, UserError

MAX_SKIPPED_IN_A_ROW = 100
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS_BETWEEN_QUESTIONS = 1.0


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGHUP, so that the loop can save and stop.

    A second SIGTERM or SIGINT acts as usual, for those who cannot wait. A second SIGHUP does
    nothing: a terminal that closes sends it twice, and service managers send it after a SIGTERM.
    Where SIGHUP was ignored from the start, as `nohup` has it, it stays so.
    """

    def __init__(
        self,
        tell: Callable[[str], None] | None = None,
        told: Callable[[], str | None] | None = None,
    ) -> None:
        """Begins to listen once it is entered.

        Args:
            tell: lets other processes of the run know of a signal that this one got; called once.
            told: the signal that another process got, None where none did; asked once a second at
                most.
        """
        self.signal: str | None = None
        self._tell, self._told = tell, told
        self._ask_again = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may ask for signals.
        main = threading.current_thread() is threading.main_thread()
        for number in HEEDED if main else ():
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(HEEDED)

    def check(self) -> None:
        """To be called between pieces of work, where all that was made is saved or can be made
        again.

        Raises:
            Interrupted: this process was asked to stop, or another one of the run.
        """
        if self.signal is None and self._told and time.monotonic() >= self._ask_again:
            self._ask_again = time.monotonic() + SECONDS_BETWEEN_QUESTIONS
            self.signal = self._told()
            if self.signal is not None:
                self._tell = None
        if self.signal is None:
            return
        tell, self._tell = self._tell, None
        if tell:
            tell(self.signal)
        raise Interrupted(f"asked to stop by {self.signal}")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
        self._restore((signal.SIGTERM, signal.SIGINT))

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))


def check_skips_in_a_row(run: Run, stage: str, step: int, in_a_row: int, grad_norm: float) -> None:
    """Stops a run whose every step is invalid: it would go on to the end and learn nothing.

    Args:
        run: the run.
        stage: the name of the stage that trains.
        step: the last step.
        in_a_row: steps skipped up to it, in this call and those before.
        grad_norm: of the last gradient.

    Raises:
        UserError: too many steps in a row were skipped; what it advises is accepted by the next
            call.
    """
    if in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    skip_norm = run.optimizer.skip_norm
    why = "their gradients are not finite"
    go_on = ""
    if math.isfinite(grad_norm):
        why = (
            f"the norm of the last gradient, {grad_norm:.3g}, is not below "
            f"optimizer.skip_norm={skip_norm:g}"
        )
        go_on = f"add --set optimizer.skip_norm={2 * grad_norm:.2g} to go on here, or "
    raise UserError(
        f"the last {in_a_row} steps up to step {step} were skipped: {why}; "
        f"{go_on}{_begin_again(run, stage)}"
    )


def check_share_of_skips(run: Run, stage: str, skipped: int) -> None:
    """Refuses to call a stage finished that learned from too few of its steps.

    Args:
        run: the run.
        stage: the name of the stage that has ended.
        skipped: of its steps.

    Raises:
        UserError: they are more than `optimizer.max_skipped` of all, and more than one.
    """
    steps, allowed = run.stages[stage].steps, run.optimizer.max_skipped
    if skipped <= max(1.0, allowed * steps):
        return
    accepted = min(1.0, math.ceil(100 * skipped / steps) / 100)
    raise UserError(
        f"{skipped} of the {steps} steps of stage {stage!r} were skipped, their gradients not "
        f"finite or of a norm not below optimizer.skip_norm={run.optimizer.skip_norm:g}, and "
        f"optimizer.max_skipped={allowed:g} of them may be; {_begin_again(run, stage)}, or add "
        f"--set optimizer.max_skipped={accepted:g} to accept it"
    )


def _begin_again(run: Run, stage: str) -> str:
    lower = run.stages[stage].learning_rate / 10
    return (
        f"begin again in another folder with a lower learning rate, as --set "
        f"stages.{stage}.learning_rate={lower:g}"
    )
