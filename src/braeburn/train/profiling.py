"""A profile of some steps, written by JAX's own profiler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Below the run directory.
FOLDER = "profile"


class Profile:
    """Profiles a window of a run's steps, in every process.

    The steps before the window are waited for when it begins, and its own when it ends, so that it
    holds its steps whole and no others.
    """

    def __init__(self, folder: Path, steps: range, say: Callable[[str], None]):
        """Profiles nothing yet.

        Args:
            folder: the run directory.
            steps: numbers of the steps, from 1 over all stages; none profiles nothing.
            say: takes lines for the user.
        """
        self._folder, self._steps, self._say = folder / FOLDER, steps, say
        self._first: int | None = None  # of the steps that are being profiled

    def before(self, step: int, state: Any) -> None:
        """Begins the profile if `step`, which is about to be dispatched, is the first to be in
        it; a call that resumes within the window begins with its own first step.
        """
        if self._first is None and step in self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._first = step

    def after(self, step: int, state: Any) -> None:
        """Ends the profile if `step`, which was dispatched, is the last one in it."""
        if self._first is not None and step == self._steps[-1]:
            jax.block_until_ready(state)
            self._end(step)

    def close(self, step: int) -> None:
        """Ends a profile that is still going on, as where a run is stopped within the window.

        Args:
            step: the last that was made.
        """
        if self._first is not None:
            self._end(step)
        elif self._steps:
            self._say(
                f"warning: nothing was profiled: this call made none of the steps "
                f"{self._steps[0]} to {self._steps[-1]}, and the run stands at step {step}"
            )

    def _end(self, last: int) -> None:
        first, self._first, self._steps = self._first, None, range(0)
        jax.profiler.stop_trace()
        self._say(f"profiled steps {first} to {last}: {str(self._folder)!r}")
