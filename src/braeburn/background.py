"""Work in threads of its own, so that what waits for it can still heed a request to stop.

A compiler, a barrier or a read of a file system that hangs cannot be interrupted, and Python runs
the handlers of signals in the main thread alone. So the main thread only ever waits for such work
in short pieces.
"""

import contextlib
import itertools
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

from braeburn.errors import Interrupted

POLL_SECONDS = 0.05
# What work that can end by itself may take for it; a process must be gone five seconds after it was
# asked to stop.
GRACE_SECONDS = 2.0

Result = TypeVar("Result")

_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def nothing_to_ask() -> None:
    """A `proceed` that never ends the work."""


class Background(Generic[Result]):
    """A function at work in a thread.

    The thread is not a daemon: a process that ends by itself waits for it, since compilers crash
    where the libraries below them are taken down. `ending_process` does not wait.
    """

    def __init__(self, function: Callable[[], Result], name: str):
        """Begins the work; `name` is that of the thread."""
        self._function = function
        self._done = threading.Event()
        self._result: Result
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"braeburn-{name}")
        _threads.add(self._thread)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def ended(self, seconds: float | None = None) -> bool:
        """Whether the work has ended, well or not, after waiting for it as long as that; by
        default, to its end.
        """
        return self._done.wait(seconds)

    def result(self, proceed: Callable[[], None] = nothing_to_ask) -> Result:
        """What the function returned, once it has.

        Args:
            proceed: called again and again while waiting. Where it raises `Interrupted`, so does
                this, after a moment for the work to end by itself; what it has returned by then is
                dropped.

        Raises:
            Interrupted: the work may still go on.
            Exception: whatever the function raised.
        """
        try:
            while not self._done.wait(POLL_SECONDS):
                proceed()
        except Interrupted:
            self._done.wait(GRACE_SECONDS)
            raise
        if self._error is not None:
            # a stop that was asked for elsewhere explains the error of one who waited for that
            proceed()
            raise self._error
        return self._result


def run(function: Callable[[], Result], name: str, proceed: Callable[[], None]) -> Result:
    """`function()` in a thread, waited for as `Background.result` does; not begun where `proceed`
    raises at once.
    """
    proceed()
    return Background(function, name).result(proceed)


def still_running() -> bool:
    """Whether some work has not ended."""
    return any(thread.is_alive() for thread in _threads)


@contextlib.contextmanager
def ending_process(before: Callable[[], None]) -> Iterator[None]:
    """Ends the process with the exit code of its block, whatever threads go on.

    Where work goes on that nothing waits for any more, that is at once. Threads that others began
    get a moment to end: orbax has some that wait for ten minutes for what comes no more once a
    write has failed.

    Args:
        before: called before an end at once.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        code = 1
        if still_running():
            sys.excepthook(*sys.exc_info())
        raise
    finally:
        if still_running():
            before()
            _end(code)
        _end_in_time(code)


def _end_in_time(code: int) -> None:
    """Has the process end soon, though Python would wait at exit for a thread that goes on."""
    waited_for = [thread for thread in threading.enumerate() if not thread.daemon]
    if len(waited_for) > 1:  # the main thread is one
        timer = threading.Timer(GRACE_SECONDS, _end, (code,))
        timer.daemon = True
        timer.start()


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Feed(Generic[Result]):
    """The items of an iterator, read by a thread, so that waiting for one can be interrupted.

    Close it after use.
    """

    def __init__(self, items: Iterator[Result], name: str, count: int | None = None):
        """Begins to read the first item; two at most wait to be taken.

        Args:
            items: read, and closed if it is a generator, by the thread.
            name: of the thread.
            count: how many to read at most; all by default.
        """
        self._items, self._count = items, count
        self._room = threading.Semaphore(1)
        self._read: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._closed = False
        self._worker = Background(self._run, name)

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in itertools.islice(self._items, self._count):
                self._read.put((True, item))
                self._room.acquire()
                if self._closed:
                    break
        except BaseException as error:
            end = error
        self._read.put((False, end))
        if close := getattr(self._items, "close", None):
            close()

    def next(self, proceed: Callable[[], None] = nothing_to_ask) -> Result:
        """The next item.

        Args:
            proceed: called again and again while waiting; what it raises ends the wait.

        Raises:
            StopIteration: there is none.
            Exception: what the iterator raised.
        """
        while True:
            try:
                there, item = self._read.get(timeout=POLL_SECONDS)
            except queue.Empty:
                proceed()
                continue
            if not there:
                raise item
            self._room.release()
            return item

    def close(self, seconds: float) -> bool:
        """Ends the thread; returns whether it has ended within so many seconds, as one that is
        stuck does not.
        """
        self._closed = True
        self._room.release()
        return self._worker.ended(seconds)


class Waited:
    """Seconds since something began, told about once in a while."""

    def __init__(self, every: float):
        """Begins to count."""
        self._began = self._told = time.monotonic()
        self._every = every

    def due(self) -> float | None:
        """The seconds waited, if it is time to tell of them (again)."""
        now = time.monotonic()
        if now - self._told < self._every:
            return None
        self._told = now
        return now - self._began
