"""Files that a run appends records to: they never stop it, whatever becomes of the disk."""

import contextlib
import errno
import io
import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What waits for room while a disk is full, in bytes; a day of rows at one a second.
PENDING_BYTES = 32 * 2**20


class Records:
    """Appends records to a file, each whole or not at all.

    A record that cannot be written is kept in memory, up to a bound beyond which the oldest are
    dropped, and written before the next one that can be. Of the trouble, and of its end, one line
    is told.
    """

    def __init__(
        self,
        path: Path,
        say: Callable[[str], None],
        *,
        lines: bool = False,
        pending: int = PENDING_BYTES,
    ):
        """Takes the file as it is; nothing is opened yet.

        Args:
            path: the file, created with the first record.
            say: takes a line when writing begins to fail, and when it works again.
            lines: whether records are lines, so that one that an earlier process left cut short
                must not join the first of this one.
            pending: bytes of records to keep in memory at most.
        """
        self.path = path
        self._say, self._lines, self._bound = say, lines, pending
        self._waiting: deque[bytes] = deque()
        self._bytes = self._dropped = 0
        self._failing = False
        self._file: io.FileIO | None = None
        self._folder: tuple[int, int] | None = None
        with contextlib.suppress(OSError):
            self._check_folder()

    def append(self, record: bytes) -> None:
        """Writes a record, and before it those that wait."""
        self._waiting.append(record)
        self._bytes += len(record)
        try:
            self._write()
        except OSError as error:
            self._keep_within_bound()
            if not self._failing:
                self._failing = True
                self._say(
                    f"warning: {str(self.path)!r} cannot be written ({error.strerror or error}); "
                    f"training goes on, and what belongs there is kept in memory until there is "
                    f"room, {self._bound:,} bytes at most"
                )
            return
        if self._failing:
            lost = (
                f"{self._dropped:,} records were dropped" if self._dropped else "nothing was lost"
            )
            self._say(f"{str(self.path)!r} can be written again; {lost}")
            self._failing, self._dropped = False, 0

    def close(self) -> None:
        """Tries a last time to write what waits, and tells how much of it is lost."""
        if self._waiting:
            try:
                self._write()
            except OSError:
                lost = len(self._waiting) + self._dropped
                self._say(f"warning: {lost:,} records could not be written to {str(self.path)!r}")
            self._waiting.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        descriptor = self._opened().fileno()
        end = os.fstat(descriptor).st_size
        if self._lines and end and os.pread(descriptor, 1, end - 1) != b"\n":
            end += os.write(descriptor, b"\n")
        while self._waiting:
            record = self._waiting[0]
            try:
                rest = memoryview(record)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
            end += len(record)
            self._bytes -= len(self._waiting.popleft())

    def _opened(self) -> io.FileIO:
        """The open file, which is begun anew where it was removed or renamed meanwhile, in the same
        folder only.
        """
        if self._file is not None:
            try:
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                    return self._file
            except FileNotFoundError:
                pass
            self._file.close()
        self._file = None
        self._check_folder()
        self._file = io.FileIO(self.path, "a+")
        return self._file

    def _check_folder(self) -> None:
        """Refuses a folder that was put in the place of the file's, which would look like a run."""
        status = self.path.parent.stat()
        folder = status.st_dev, status.st_ino
        if self._folder not in (None, folder):
            raise FileNotFoundError(errno.ENOENT, "its folder was moved or deleted", str(self.path))
        self._folder = folder

    def _keep_within_bound(self) -> None:
        while self._bytes > self._bound and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft())
            self._dropped += 1


def json_line(fields: dict[str, Any]) -> bytes:
    """An object as a line of JSON."""
    return (json.dumps(fields) + "\n").encode()
