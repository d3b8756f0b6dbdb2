"""Who does the work of preparing text: threads of this process, or processes of this machine.

A task is a value that can be pickled. It may be done twice and by anyone, with the same result, so
nothing is coordinated but who begins with what.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from braeburn.errors import UserError

THREADS = 2  # while one reads, which takes Python, the other tokenises, which does not
SECONDS_BETWEEN_LOOKS = 0.5

Task = TypeVar("Task")
Result = TypeVar("Result")
# What does a task; it calls its second argument about once a second, which may raise to end it.
Function = Callable[[Task, Callable[[], None]], Result]


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        done: bytes on disk, compressed where they are, that have been worked through.
        total: bytes of all files that were to be.
        seconds: since the work began.
        before: of the bytes done, those that an earlier call had worked through.
    """

    done: int
    total: int
    seconds: float
    before: int = 0

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return (self.done - self.before) / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at this rate; None where nothing was done."""
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(frozen=True)
class Work:
    """How text is prepared.

    Attributes:
        proceed: called about once a second, from any thread. What it raises ends the work; what was
            tokenised stays.
        watch: told every second or so how far the tokenising is.
        processes: that tokenise; None for as many as there are cores for this process.
        ray: the address of a Ray cluster that does the work; None for this machine.
    """

    proceed: Callable[[], None] = lambda: None
    watch: Callable[[Progress], None] = lambda progress: None
    processes: int | None = None
    ray: str | None = None

    @property
    def count(self) -> int:
        """How many processes."""
        return self.processes or cores()


ALONE = Work()


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


class _Cancelled(Exception):
    """The work is over since another task failed."""


def in_threads(
    function: Function[Task, Result],
    tasks: Sequence[Task],
    proceed: Callable[[], None],
    done: Callable[[Task, Result], None],
) -> None:
    """Does tasks in two threads of this process.

    Args:
        function: does one.
        tasks: all of them.
        proceed: called about once a second, from any thread. What it raises ends the work.
        done: told of each that is done, from any thread.

    Raises:
        Exception: what a task or `proceed` raised.
    """
    failed = threading.Event()

    def proceed_unless_failed() -> None:
        if failed.is_set():
            raise _Cancelled
        proceed()

    def run(task: Task) -> None:
        try:
            proceed_unless_failed()
            done(task, function(task, proceed_unless_failed))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(run, task) for task in tasks]
    _raise_first([future.exception() for future in futures])


def _raise_first(failures: Sequence[BaseException | None]) -> None:
    found = [failure for failure in failures if failure is not None]
    for failure in sorted(found, key=lambda failure: isinstance(failure, _Cancelled)):
        raise failure


def in_processes(
    function: Function[Task, Result],
    tasks: Sequence[Task],
    count: int,
    proceed: Callable[[], None],
    done: Callable[[Task, Result], None],
) -> None:
    """Does tasks in processes of this machine, which import neither the caller's main module nor
    JAX, and end with this one, however it ends.

    Args:
        function: does one; it can be pickled, and is sent to each process once.
        tasks: all of them, which can be pickled, too.
        count: processes.
        proceed: called about every half second, from this thread. What it raises ends the work, and
            the processes at once.
        done: told of each that is done, from this thread.

    Raises:
        UserError: a process was killed.
        Exception: what a task or `proceed` raised.
    """
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    # A tokenizer would otherwise take all cores in each of them.
    threads = {"RAYON_NUM_THREADS": str(max(1, cores() // count))}
    executor = ProcessPoolExecutor(
        count, env=threads, initializer=_begin, initargs=(os.getpid(), function)
    )
    waiting = list(reversed(tasks))
    running: dict[Future[Any], Task] = {}
    finished = False
    try:
        while waiting or running:
            while waiting and len(running) < 2 * count:
                task = waiting.pop()
                running[executor.submit(_do, task)] = task
            ended, _ = wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            proceed()
            for future in ended:
                done(running.pop(future), future.result())
        finished = True
    except BrokenProcessPool:
        raise UserError(
            f"a process that tokenises was killed, as where memory runs out; run the same command "
            f"again, which goes on from there, or `braeburn prepare` with fewer processes, as "
            f"--workers {max(1, count // 2)}"
        ) from None
    finally:
        executor.shutdown(wait=True, kill_workers=not finished)


_function: Function[Any, Any]  # of a process that does tasks


def _do(task: Any) -> Any:
    return _function(task, lambda: None)


def _begin(parent: int, function: Function[Any, Any]) -> None:
    """Makes this process one that does tasks."""
    global _function
    _function = function
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Ends this process soon after the one that started it is gone, even killed.

    Signals that a terminal or a service manager sends to every process are for that process to
    heed: it still needs this one, or ends it itself.

    Args:
        parent: the number of the process that started this one.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
