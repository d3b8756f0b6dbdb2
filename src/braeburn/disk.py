"""What processes that write the same disk owe one another and their user: locks, and room for what they begin."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braeburn.errors import UserError


@contextmanager
def locked(path: Path, in_use: str) -> Iterator[None]:
    """Holds the lock that a file is, until the end of this process at the latest; on file systems without, nothing.

    Raises:
        UserError: another process holds it; `in_use` is the sentence.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(in_use) from None
        except OSError:
            pass  # a file system without locks
        yield


def check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuses to begin what has no room.

    Args:
        folder: to be written to.
        needed: bytes.
        what: takes them, with its verb.
        remedy: besides freeing some.

    Raises:
        UserError: naming what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"no space left: {what} {needed:,} bytes and {str(folder)!r} has {free:,} free; {remedy}")
