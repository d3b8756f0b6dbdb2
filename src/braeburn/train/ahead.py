"""What needs the compiler, worked on in threads ahead of its use."""

import functools
from collections.abc import Callable

from braeburn.background import Background
from braeburn.train.resolved import ResolvedStage
from braeburn.train.stages import Program, compile_stage, initial_state, started_state
from braeburn.train.state import TrainState
from braeburn.train.teaching import Teacher


class Ahead:
    """What the first stage to run needs of the compiler, worked on in a thread while text is being
    tokenised.
    """

    def __init__(
        self, stages: dict[str, ResolvedStage], resumed: int | None, start: Teacher | None = None
    ):
        """Begins the work.

        Args:
            stages: all stages of the run by name.
            resumed: the step to go on from; None to begin.
            start: holds the weights to begin with; None for random ones.
        """
        self._programs: dict[str, Background[Program]] = {}
        self._first = next(iter(stages.values()))
        self._start = start
        self._state: Background[TrainState] | None = None
        run = self._first.run
        if resumed != run.total_steps:
            name = run.stage_at(resumed or 0)[0]
            work = functools.partial(compile_stage, stages[name])
            self._programs[name] = Background(work, "compiling")
        if resumed is None:
            self._state = Background(self._first_state, "initialising")

    def _first_state(self) -> TrainState:
        for program in self._programs.values():
            program.ended()  # not both at once, which would take the memory of both
        if self._start:
            return started_state(self._first, self._start.read)
        return initial_state(self._first)

    def state(self, proceed: Callable[[], None]) -> TrainState:
        """The state before the run's first step.

        Args:
            proceed: called while waiting for it.

        Raises:
            Interrupted: `proceed` raised it.
        """
        assert self._state is not None  # it is not asked for where a run goes on
        return self._state.result(proceed)

    def program(self, resolved: ResolvedStage) -> Program:
        """The program of a stage, compiled here where it was not begun."""
        begun = self._programs.get(resolved.name)
        return begun.result() if begun else compile_stage(resolved)
