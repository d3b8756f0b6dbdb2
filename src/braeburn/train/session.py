"""What all parts of a call of `train` work with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from braeburn import background
from braeburn.config import Run
from braeburn.errors import Interrupted
from braeburn.parallel.agreement import AnyProcess
from braeburn.train.directory import RunDirectory
from braeburn.train.guard import StopRequest
from braeburn.train.heartbeat import Heartbeat
from braeburn.train.progress import Display
from braeburn.train.remote_run import RemoteRun
from braeburn.train.resolved import ResolvedStage

Result = TypeVar("Result")


class Agreement:
    """What the processes of a run agree on: to stop, where one of them was asked to."""

    def __init__(self, stop: StopRequest):
        """Every process must make one, and ask it equally often."""
        self._stop = stop
        self._any_process = AnyProcess()

    def to_stop(self) -> bool:
        """Whether all are to stop now. To be called equally often in all processes, while they
        compute together.
        """
        return self._any_process.wants(self._stop.signal is not None)

    def check(self) -> None:
        """As `to_stop`, for work that an exception ends.

        Raises:
            Interrupted: in all processes at once, where one was asked to stop.
        """
        if self.to_stop():
            raise Interrupted


@dataclass(frozen=True)
class Session:
    """One call of `train`.

    Attributes:
        stages: all stages of the run by name.
        directory: the run's folder.
        display: takes lines for the user.
        stop: what this process was asked.
        agreement: what all processes agree on.
        heartbeat: tells a launcher what the process is at.
        remote: where the run directory really is; None where it is a local folder.
    """

    stages: dict[str, ResolvedStage]
    directory: RunDirectory
    display: Display
    stop: StopRequest
    agreement: Agreement
    heartbeat: Heartbeat
    remote: RemoteRun | None = None

    @property
    def first(self) -> ResolvedStage:
        """The run's first stage."""
        return next(iter(self.stages.values()))

    @property
    def run(self) -> Run:
        """The run."""
        return self.first.run

    def stage_at(self, step: int) -> ResolvedStage:
        """The stage that makes the step after `step` others; the last one after all steps."""
        return self.stages[self.run.stage_at(min(step, self.run.total_steps - 1))[0]]

    def ends_stage(self, step: int) -> bool:
        """Whether a stage has ended after `step` steps."""
        return any(step == stage.last_step for stage in self.stages.values())

    def unsaving(self, work: Callable[[], Result], phase: str) -> Result:
        """The result of work that begins when every step is saved, so that a stop need not wait for
        its end.

        Raises:
            Interrupted: a stop was asked for.
        """
        return background.run(work, phase, self.stop.check)
