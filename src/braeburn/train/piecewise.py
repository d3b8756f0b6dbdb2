"""Writes arrays that are made piece by piece into a checkpoint, each process its share of them.

Orbax runs in the main process alone, where it prepares the folder and joins at its end whatever
databases the processes have left there. `Writer` is what it writes `Pieces` by: for each array it
tells the other processes how orbax would store it, and they write their share of the pieces in the
same way, each into a database of its own, as orbax's processes do.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from braeburn.errors import UserError
from braeburn.parallel.agreement import Told
from braeburn.parallel.processes import ProcessLost
from braeburn.train.stored import Pieces

# The folder of a process's database, as orbax names it.
_DATABASE = "/ocdbt.process_{}/"
_WRITTEN, _FAILED = "written", "failed"
# What the main process tells of itself.
_MAIN = "the main process"
# For other processes to end what they write, so that what was begun can be removed.
_SECONDS_TO_STOP = 60.0


def own_pieces(number: int, pieces: Pieces, spec: dict[str, Any]) -> range:
    """The numbers of the pieces of an array that this process writes.

    No two processes write into one chunk: where an array has chunks of more than one layer, or is
    made whole, one process writes all of it.

    Args:
        number: of the array, by which arrays are dealt out.
        pieces: the array.
        spec: how it is stored, as TensorStore describes it.
    """
    index, processes = jax.process_index(), jax.process_count()
    chunks = spec["metadata"]["chunks"]
    if pieces.count == 1 or chunks[0] != 1:
        return range(pieces.count if number % processes == index else 0)
    return range((index - number) % processes, pieces.count, processes)


def write_share(name: str, arrays: Sequence[Pieces]) -> None:
    """Writes this process's share of all arrays, in a process that is not the main one.

    Args:
        name: of what is written, as the main process's `Writer` has it.
        arrays: all of them, in the order of the `Writer`.

    Raises:
        UserError: a piece cannot be made.
        ProcessLost: the main process failed.
    """
    told, context = Told(name), ts.Context()
    answer = _FAILED
    try:
        for number, pieces in enumerate(arrays):
            text = told.value(f"array {number}")
            if text == _FAILED:
                told.failed()
            own = text.replace(_DATABASE.format(0), _DATABASE.format(jax.process_index()))
            spec = json.loads(own)
            # Of the main process's context.
            del spec["kvstore"]["cache_pool"]
            numbers = own_pieces(number, pieces, spec)
            if numbers:
                store = ts.open(ts.Spec(spec), create=True, open=True, context=context).result()
                for _ in _write(store, pieces, numbers):
                    if told.heard(_MAIN) == _FAILED:
                        told.failed()
        answer = _WRITTEN
    except (UserError, OSError) as error:
        answer = str(error)
        raise
    except ProcessLost:
        raise
    except Exception as error:
        # The folder is gone where the main process has failed.
        if told.heard(_MAIN) == _FAILED:
            told.failed(error)
        raise
    finally:
        told.tell(f"the share of process {jax.process_index()}", answer)


def _write(store: Any, pieces: Pieces, numbers: Sequence[int]) -> Iterator[None]:
    """Writes pieces of an array, each while the next one is made; yields as each is on its way."""
    writing = None
    for index, values in pieces.pieces(numbers):
        if writing is not None:
            writing.result()
        writing = store[index].write(values)
        yield
    if writing is not None:
        writing.result()


class Writer(ocp.type_handlers.NumpyHandler):
    """Writes `Pieces` into the files that orbax would write the whole array into."""

    def __init__(self, name: str, arrays: Sequence[Pieces]):
        """Takes the arrays.

        Args:
            name: of what is written, in words that no other exchange of the processes has.
            arrays: all that will be written, in the order that `write_share` has them in.
        """
        super().__init__(deepcopy_host_arrays=False)
        self._numbers = {id(leaf): number for number, leaf in enumerate(arrays)}
        self._told = Told(name) if jax.process_count() > 1 else None
        self._left = len(arrays)
        self._lock = threading.Lock()
        # From the thread that writes: how many more pieces are done with, and None where it failed.
        self._written: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._total = sum(leaf.count for leaf in arrays)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Has the thread that writes end at the next piece, and the other processes as well; for
        these it waits.
        """
        self._stopped.set()
        if self._told:
            for key in (_MAIN, *(f"array {number}" for number in self._numbers.values())):
                self._told.tell(key, _FAILED)
            for index in range(1, jax.process_count()):
                with suppress(ProcessLost):
                    self._told.heard(f"the share of process {index}", _SECONDS_TO_STOP)

    @property
    def total(self) -> int:
        """Pieces of all arrays."""
        return self._total

    def written(self, check: Callable[[], None]) -> Iterator[int]:
        """The number of each piece once it is written, or is known to be another process's, up to
        the last one; it ends early where one fails.

        Args:
            check: raises where the thread that writes has failed.
        """
        number = 0
        while number < self._total:
            try:
                more = self._written.get(timeout=1.0)
            except queue.Empty:
                check()
                continue
            if more is None:
                return
            yield from range(number, number + more)
            number += more

    async def _open_and_write(self, value: Pieces, spec: dict[str, Any], context: Any) -> None:
        # Nothing is awaited between pieces, so that arrays are written one after the other.
        try:
            number = self._numbers[id(value)]
            if self._told:
                self._told.tell(f"array {number}", json.dumps(spec))
            own = own_pieces(number, value, spec)
            self._written.put(value.count - len(own))
            if own:
                store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
                for _ in _write(store, value, own):
                    if self._stopped.is_set():
                        raise InterruptedError
                    self._written.put(1)
            self._wait_after_last()
        except BaseException:
            self._written.put(None)
            raise

    def _wait_after_last(self) -> None:
        """Waits for the other processes, once all arrays are written here: orbax then joins what
        all have written.
        """
        with self._lock:
            self._left -= 1
            left = self._left
        if left or not self._told:
            return
        for index in range(1, jax.process_count()):
            answer = self._told.value(f"the share of process {index}")
            if answer == _FAILED:
                self._told.failed()
            if answer != _WRITTEN:
                raise UserError(answer)
