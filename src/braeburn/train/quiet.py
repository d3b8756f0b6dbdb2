"""What commands keep other libraries from printing. Only commands do: a program that imports this
package decides for itself what is logged.
"""

import logging
import sys
import threading
import warnings
from typing import Any

_quiet = False


def quieten_orbax() -> None:
    """Leaves a write that fails to be raised where it is waited for; orbax also prints it from each
    of its threads.
    """
    global _quiet
    if _quiet:
        return
    _quiet = True
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # What orbax had planned to write after that.
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def print_of_thread(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("orbax."):
            in_thread(failure)

    # Writes that the first failure left behind report to an event loop that is gone, or was never
    # whole.
    def print_unraisable(failure: Any) -> None:
        closed = str(failure.exc_value) == "Event loop is closed"
        if not closed and "BaseEventLoop.__del__" not in repr(failure.object):
            unraisable(failure)

    threading.excepthook, sys.unraisablehook = print_of_thread, print_unraisable
