"""The batches of a stage, read ahead of the step that needs them."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import jax

from braeburn import background
from braeburn.data.loader import Batches, prefetch
from braeburn.data.packing import Batch
from braeburn.errors import Interrupted
from braeburn.parallel.processes import ProcessLost
from braeburn.train.progress import duration
from braeburn.train.session import Session

SECONDS_BETWEEN_WARNINGS = 60.0
# For worker processes to end by themselves, and for their reader to see that they are gone; grain
# alone would wait for 25.
SECONDS_FOR_WORKERS = 0.5
SECONDS_FOR_READER = 1.5


class BatchFeed:
    """A thread that reads batches, and worker processes where `data.workers` says so.

    It reads as long as its `with` block lasts, at whose end it ends workers that do not end by
    themselves.
    """

    def __init__(self, session: Session, batches: Batches, first: int, until: int):
        """Begins to read.

        Args:
            session: the call.
            batches: of a stage.
            first: the first step of the stage to read for.
            until: the step of the stage to end before.
        """
        self._session = session
        data = session.run.data
        items = prefetch(batches, first, data.workers, data.prefetch)
        self._stream = background.Feed(items, "reading batches", until - first)
        self._others: set[BaseProcess] = set()

    def __enter__(self) -> "BatchFeed":
        self._others = set(multiprocessing.active_children())
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stream.close(SECONDS_FOR_WORKERS):
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.kill()
            self._stream.close(SECONDS_FOR_READER)  # which sees that they are gone

    def next(self, step: int) -> Batch:
        """The next batch.

        Args:
            step: of the run, that the batch is for; it is named where the batch does not come.

        Raises:
            Interrupted: this process alone decides, and was asked to stop.
            ProcessLost: as `_waiting` says.
        """
        batch: Batch = self._stream.next(self._waiting(step))
        return batch

    def _waiting(self, step: int) -> Callable[[], None]:
        """What is to be asked while a batch is waited for.

        It raises `Interrupted` where this process alone decides, and `ProcessLost` where others
        wait for it in the middle of a step and cannot save: what was made since the last checkpoint
        is then made again.
        """
        waited = background.Waited(SECONDS_BETWEEN_WARNINGS)
        alone = jax.process_count() == 1
        stop, workers = self._session.stop, self._session.run.data.workers
        asked = 0.0

        def proceed() -> None:
            nonlocal asked
            if seconds := waited.due():
                remedy = (
                    f"see whether the {workers} processes of data.workers still run"
                    if workers
                    else "see the disk"
                )
                self._session.display.say(
                    f"warning: the batch of step {step} has not come for {duration(seconds)}; "
                    f"{remedy}"
                )
            if stop.signal is None:
                return
            if alone:
                raise Interrupted
            asked = asked or time.monotonic()
            if time.monotonic() - asked > background.GRACE_SECONDS:
                raise ProcessLost(
                    f"asked to stop by {stop.signal} while no batch came for step {step}"
                )

        return proceed
